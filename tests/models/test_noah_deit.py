"""DeiT with NOAH, beside its twins."""
import pytest
import timm
import torch

from noah_zoo.catalog import family


@pytest.mark.parametrize('name', [name for row in family('deit')[:3] for name in (row.name, row.vanilla)])
def test_tokens_lie_in_order_in_every_block(name):
    # else every norm copies them, and the model loses a quarter of its speed on a GPU
    model = timm.create_model(name, depth=2).eval()
    seen = []
    for module in (model.blocks[0].norm1, model.blocks[1].norm1, model.norm):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    with torch.inference_mode():
        model(torch.randn(2, 3, 224, 224))
    assert seen == [True] * 3

"""The paper's ablations: every variant against its formula, and every parameter count of Tables VI to XIV."""
import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SEModule
from timm.models import save_for_hf

import noah_zoo  # noqa: F401  registers the models
from noah_zoo import NoahHead
from noah_zoo.layers.ablations import VARIANTS, PocaVariant, head_class

# Millions of parameters, as printed.
TABLE_VI = {(4, 1 / 2): 25.56, (4, 1 / 4): 25.56, (4, 1 / 8): 25.56, (1, 1 / 8): 25.56, (2, 1 / 8): 25.56,
            (8, 1 / 8): 25.57}
TABLE_VII = {  # backbone: vanilla, neither split, without the second-level split, with both
    'resnet152': (60.19, 74.54, 62.25, 60.20), 'resnet101': (44.55, 58.89, 46.60, 44.56),
    'resnet50': (25.56, 39.90, 27.61, 25.56), 'resnet18': (11.69, 15.28, 12.21, 11.70)}
TABLES_VIII_IX = ('channel_softmax', 'max', 'avg')  # of ResNet50: 25.56
TABLE_X = {None: 11.70, 'a': 11.96, 'b': 11.76, 'c': 11.70, 'd': 15.79, 'e': 11.69, 'f': 11.73}
TABLE_XI = 27.04
# Tables XII and XIII. Their SE is without biases: with them, as timm's own 'se', ResNet50 has 28.09M. CGC, WeightNet
# and WE are other convolutions, which timm does not have; those three rows are left out.
SE = partial(SEModule, bias=False)
TABLES_XII_XIII = {
    'resnet18': {SE: 11.78, 'se': 11.78, 'cbam': 11.78, 'eca': 11.69}, 'resnet18_noah': {None: 11.70, 'cbam': 11.78},
    'resnet50': {SE: 28.07, 'se': 28.09, 'cbam': 28.07, 'eca': 25.56}, 'resnet50_noah': {None: 25.56, 'cbam': 28.08}}
TABLE_XIV = {'resnet18': 13.79, 'resnet50': 33.94, 'resnet18_noah': 13.82, 'resnet50_noah': 33.97}  # 5,089 classes


def millions(name, **kwargs):
    with torch.device('meta'):
        return round(sum(p.numel() for p in timm.create_model(name, **kwargs).parameters()) / 1e6, 2)


def test_counts_of_table_vi():
    for (num_groups, key_ratio), printed in TABLE_VI.items():
        assert millions('resnet50_noah', num_groups=num_groups, key_ratio=key_ratio) == printed


@pytest.mark.parametrize('name', TABLE_VII)
def test_counts_of_table_vii(name):
    noah = partial(millions, f'{name}_noah')
    counts = millions(name), noah(noah_variant='no_split'), noah(noah_variant='no_split_kv'), noah()
    assert counts == TABLE_VII[name]
    assert noah(split_kv=False) == TABLE_VII[name][2]


def test_counts_of_tables_viii_to_xi():
    for variant in TABLES_VIII_IX:
        assert millions('resnet50_noah', noah_variant=variant) == 25.56
    for variant, printed in TABLE_X.items():
        assert millions('resnet18_noah', noah_variant=variant) == printed, variant
    assert millions('resnet50_noah', noah_variant='self_attention') == TABLE_XI


@pytest.mark.parametrize('name', TABLES_XII_XIII)
def test_counts_of_tables_xii_and_xiii(name):
    for attn_layer, printed in TABLES_XII_XIII[name].items():
        assert millions(name, block_args=dict(attn_layer=attn_layer)) == printed, attn_layer


def test_counts_of_table_xiv():
    for name, printed in TABLE_XIV.items():
        assert millions(name, num_classes=5089) == printed


@pytest.mark.parametrize('variant, count', [
    (None, 520_000), ('no_split_kv', 1_032_000), ('no_split', 4_104_000), ('a', 779_240), ('b', 579_560),
    ('c', 520_000), ('d', 4_616_000), ('e', 516_516), ('f', 553_280)])
def test_parameters_of_the_heads(variant, count):
    head = head_class(variant)(512, 1000, num_groups=4, key_ratio=0.5, device='meta')
    assert sum(p.numel() for p in head.parameters()) == count


def embed(conv, x, group, groups):
    """The part of a grouped convolution that belongs to one group, from its definition."""
    width, maps = x.shape[1] // groups, conv.out_channels // groups
    weight, bias = (p[group * maps:(group + 1) * maps] for p in (conv.weight, conv.bias))
    if conv.kernel_size == (3, 3):
        return F.conv2d(x[:, group * width:(group + 1) * width], weight, bias, padding=1).flatten(2)
    x = x[:, group * width:(group + 1) * width].flatten(2)
    return torch.einsum('bcl,kc->bkl', x, weight[:, :, 0, 0]) + bias[:, None]


def expected(variant, head, x):
    """Logits by a loop over POCA blocks."""
    if variant == 'self_attention':
        tokens = x.flatten(2).mT
        pooled = []
        for query, key, value in zip(*(layer(tokens).chunk(8, -1) for layer in (head.query, head.key, head.value))):
            pooled.append(((query @ key.mT / 60 ** 0.5).softmax(-1) @ value).mean(1))
        return head.fc(torch.cat(pooled, 1))
    groups, split = head.num_groups, head.key_features
    keys, values = (x, x) if variant in ('e', 'no_split_kv', 'no_split') else (x[:, :split], x[:, split:])
    if variant == 'f':
        keys, values = head.key[0](keys), head.value[0](values)
    key_conv, value_conv = (head.key[1], head.value[1]) if variant == 'f' else (head.key, head.value)
    blocks = []
    for n in range(groups):
        if variant == 'no_split':
            maps = [
                F.conv2d(x, conv.weight, conv.bias).flatten(2).chunk(groups, 1)[n] for conv in (key_conv, value_conv)]
        else:
            maps = embed(key_conv, keys, n, groups), embed(value_conv, values, n, groups)
        attention = {'c': torch.sigmoid, 'channel_softmax': lambda key: key.softmax(1)}.get(
            variant, lambda key: key.softmax(2))(maps[0])
        local = attention * maps[1]
        blocks.append({'max': local.amax(2), 'avg': local.mean(2)}.get(variant, local.sum(2)))
    if variant == 'b':
        return head.fc(torch.cat(blocks, 1))
    return head.fc(sum(blocks)) if variant == 'a' else sum(blocks)


@pytest.mark.parametrize('variant', [None, *VARIANTS])
def test_formula(variant):
    torch.manual_seed(0)
    head = (head_class(variant) if variant else PocaVariant)(
        32, 10, num_groups=4, key_ratio=0.25, input_fmt='NHWC', dtype=torch.float64).eval()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 32, 5, 4, dtype=torch.float64)
    logits = head(x.permute(0, 2, 3, 1))
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits, expected(variant, head, x), rtol=1e-10, atol=1e-10)
    if variant in (None, 'channel_softmax', 'max', 'avg', 'c'):  # the layers of NOAH
        standard = NoahHead(32, 10, num_groups=4, key_ratio=0.25, dtype=torch.float64).eval()
        standard.load_state_dict(head.state_dict())
        assert torch.allclose(standard(x), logits) == (variant is None)


def create(variant, **kwargs):
    return timm.create_model('noah', backbone='test_resnet', num_classes=7, noah_variant=variant, **kwargs)


@pytest.mark.parametrize('variant', VARIANTS)
def test_contract(variant, tmp_path):
    torch.manual_seed(0)
    model = create(variant)
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        logits = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x), logits)
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), logits)
        tuned = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).eval()
        assert tuned(x).shape == (2, 3)
        assert torch.equal(tuned.forward_features(x), model.forward_features(x))
        kind = type(model.get_classifier())
        model.reset_classifier(0)
        assert model(x).shape == (2, 96)
        model.reset_classifier(4)
        assert type(model.get_classifier()) is kind and model(x).shape == (2, 4)


@pytest.mark.export
@pytest.mark.parametrize('variant', VARIANTS)
def test_compilers(variant):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = create(variant).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = model(x)
        for compiled in (
                torch.compile(model, fullgraph=True, backend='eager'), torch.jit.script(model),
                torch.export.export(model, (x,)).module()):
            torch.testing.assert_close(compiled(x), logits, rtol=1e-5, atol=1e-5)


def test_by_name_on_tokens_and_refused():
    x = torch.randn(2, 3, 64, 64)
    for variant in VARIANTS:
        build = partial(
            timm.create_model, 'noah', backbone='test_vit', img_size=64, num_classes=5, noah_variant=variant)
        if variant == 'd':
            with pytest.raises(ValueError, match="noah_variant='d': its 3x3 kernels need a map"):
                build()
        else:
            assert build()(x).shape == (2, 5)
    with pytest.raises(ValueError, match="resnet18_noah: noah_variant='g' is unknown; choose from no_split, .*, self"):
        timm.create_model('resnet18_noah', noah_variant='g')


@pytest.mark.parametrize('attn_layer', ['se', 'cbam', 'eca'])
def test_attention_in_the_backbone(attn_layer, tmp_path):
    torch.manual_seed(0)
    model = create(None, block_args=dict(attn_layer=attn_layer))
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))

"""ResNet with an embedding between pooling and classifier, for person re-identification (paper, Table XV).

Under a NOAH head, timm.create_model('noah', backbone='reid_resnet50'), the embedding is per position, as is everything
that a model does there.
"""
from typing import Any, Dict, Optional

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

default_cfgs = generate_default_cfgs({
    'reid_resnet50.a1_in1k': {  # the weights of timm's resnet50; the embedding has none
        'hf_hub_id': 'timm/resnet50.a1_in1k', 'num_classes': 1000, 'input_size': (3, 256, 128), 'pool_size': (8, 4),
        'crop_pct': 1., 'crop_mode': 'squash', 'interpolation': 'bilinear', 'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD, 'first_conv': 'conv1', 'classifier': 'fc'}})


class ReidResNet(ResNet):
    """timm's ResNet; `forward_head(x, pre_logits=True)` is the embedding (B, `embedding_size`) of the pooled features.

    Args:
        embedding_size: Channels of the embedding, a linear layer.
        **kwargs: As of timm's `ResNet`.
    """

    def __init__(self, *args, embedding_size: int = 512, num_classes: int = 1000, **kwargs) -> None:
        super().__init__(*args, num_classes=0, **kwargs)
        self.embedding = nn.Linear(self.num_features, embedding_size)
        nn.init.normal_(self.embedding.weight, std=self.num_features ** -0.5)
        nn.init.zeros_(self.embedding.bias)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As timm's."""
        super().reset_classifier(0, global_pool)
        self.num_classes, self.head_hidden_size = num_classes, self.embedding.out_features
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the embedding with `pre_logits`; without pooling it is per position, (B, C, H, W)."""
        x = F.dropout(self.global_pool(x), float(self.drop_rate), self.training)
        x = self.embedding(x.movedim(1, -1)).movedim(-1, 1)
        return x if pre_logits else self.fc(x)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Any]:
    """Of weights without an embedding, which are timm's of ResNet, it and the classifier after it stay as they were."""
    if 'embedding.weight' in state_dict:
        return state_dict
    new = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(('embedding.', 'fc.'))}
    return {**{name: tensor for name, tensor in state_dict.items() if not name.startswith('fc.')}, **new}


@register_model
def reid_resnet50(pretrained: bool = False, **kwargs) -> ReidResNet:
    """ResNet-50 with an embedding of 512 channels."""
    return build_model_with_cfg(
        ReidResNet, 'reid_resnet50', pretrained, pretrained_filter_fn=checkpoint_filter_fn, block=Bottleneck,
        layers=(3, 4, 6, 3), **kwargs)

"""ShuffleNetV2, with NOAH and vanilla. The layers are torchvision's, timm's interface is added here."""
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..catalog import weights_at
from .builder import build_model, build_noah
from .pyramid import take_indices


class ShuffleNetV2(torchvision.models.ShuffleNetV2):
    """torchvision's ShuffleNetV2 (https://arxiv.org/abs/1807.11164) with timm's model interface.

    Args:
        stages_repeats: Units in stages 2, 3 and 4.
        stages_out_channels: Channels after conv1, stages 2, 3, 4 and conv5.
        num_classes: Number of logits; 0 for pooled features.
        in_chans: Channels of the image.
        global_pool: timm's pooling type, '' for none.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            stages_repeats: List[int],
            stages_out_channels: List[int],
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(stages_repeats, stages_out_channels, num_classes=1)
        stem_chs, *stage_chs, self.num_features = stages_out_channels
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, stem_chs, 3, 2, 1, bias=False)
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = [
            dict(module=module, num_chs=num_chs, reduction=reduction) for module, num_chs, reduction in
            zip(('maxpool', 'stage2', 'stage3', 'stage4'), (stem_chs, *stage_chs), (4, 8, 16, 32))]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        blocks = r'^stage(\d)' if coarse else r'^stage(\d)\.(\d+)'
        return dict(stem=r'^conv1', blocks=[(blocks, None), (r'^conv5', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in backward, to save memory."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling if `global_pool` is given."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        weight = self.conv5[0].weight
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.fc.to(device=weight.device, dtype=weight.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Union[int, List[int], None] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Feature maps (B, C, H, W) at strides 4, 8, 16 and 32, after the final features; see timm for the arguments.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW' or a stage does not exist.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'")
        take = take_indices(4, indices)
        intermediates = []
        for i, stages in enumerate(((self.conv1, self.maxpool), (self.stage2,), (self.stage3,), (self.stage4,))):
            if stop_early and i > max(take):
                break
            for stage in stages:
                x = self._forward_stage(stage, x)
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self.conv5(x), intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop what the given intermediates do not need."""
        take = take_indices(4, indices)
        for i in range(max(take) + 1, 4):
            setattr(self, f'stage{i + 1}', nn.Identity())
        if prune_norm or max(take) < 3:
            self.conv5 = nn.Sequential(nn.Identity())
        if prune_head:
            self.fc = nn.Identity()
        return take

    def _forward_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and isinstance(stage, nn.Sequential) and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, num_features, H / 32, W / 32)."""
        x = self.maxpool(self.conv1(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in (self.stage2, self.stage3, self.stage4):
                x = checkpoint_seq(stage, x)
        else:
            x = self.stage4(self.stage3(self.stage2(x)))
        return self.conv5(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or pooled features (B, C) with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1.0', 'classifier': 'fc',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'shufflenetv2_100.osvai_in1k*': _cfg(**weights_at('shufflenetv2_100')),
    'shufflenetv2_100_noah.osvai_in1k*': _cfg(
        classifier=('fc.key', 'fc.value'), **weights_at('shufflenetv2_100_noah')),
})
_FEATURES = dict(feature_cls='getter', out_indices=(0, 1, 2, 3))


@register_model
def shufflenetv2_100(pretrained: bool = False, **kwargs) -> ShuffleNetV2:
    """ShuffleNetV2 1.0x."""
    model_args = dict(stages_repeats=[4, 8, 4], stages_out_channels=[24, 116, 232, 464, 1024])
    return build_model(
        ShuffleNetV2, 'shufflenetv2_100', pretrained, feature_cfg=_FEATURES, **dict(model_args, **kwargs))


@register_model
def shufflenetv2_100_noah(pretrained: bool = False, **kwargs) -> ShuffleNetV2:
    """ShuffleNetV2 1.0x with NOAH, N=8, r=1/4."""
    return build_noah('shufflenetv2_100_noah', pretrained, feature_cfg=_FEATURES, **kwargs)

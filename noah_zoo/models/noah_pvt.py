"""Pyramid Vision Transformer v1, with NOAH and vanilla. timm has only its second version."""
from functools import partial
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, create_classifier, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..catalog import family, weights_at
from .builder import build_model, build_noah
from .pyramid import take_indices


class Attention(nn.Module):
    """Self-attention whose keys and values are read from a map made `sr_ratio` times smaller.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        sr_ratio: Kernel and stride of the reduction; 1 for none.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout after the projection.
    """

    def __init__(
            self, dim: int, num_heads: int, sr_ratio: int, attn_drop: float = 0., proj_drop: float = 0.,
            device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd)
            self.norm = nn.LayerNorm(dim, **dd)
        else:
            self.sr = self.norm = nn.Identity()

    def forward(self, x_BLC: Tensor, height: int, width: int) -> Tensor:
        B, L, C = x_BLC.shape
        reduced = x_BLC
        if self.sr_ratio > 1:
            reduced = self.sr(x_BLC.transpose(1, 2).reshape(B, C, height, width))
            reduced = self.norm(reduced.flatten(2).transpose(1, 2))
        q = self.q(x_BLC).reshape(B, L, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(reduced).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, L, C)))


class Block(nn.Module):
    """Pre-norm transformer block with `Attention`."""

    def __init__(
            self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, attn_drop: float = 0.,
            proj_drop: float = 0., drop_path: float = 0., device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = Attention(dim, num_heads, sr_ratio, attn_drop, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, a linear embedding, a norm: (B, C, H, W) to (B, L, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tuple[Tensor, int, int]:
        x = self.proj(x)
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class Stage(nn.Module):
    """Patch embedding, position embedding resized to the map, blocks; a class token in front if it has one.

    Args:
        in_chans: Channels of the input map.
        dim: Channels of the output.
        depth: Number of blocks.
        patch_size: Stride of the stage.
        grid_size: Height and width of the position embedding.
        class_token: Whether a class token joins the patches.
        pos_drop: Dropout after the position embedding.
        drop_path: Stochastic depth rate of each block.
        **block_args: See `Block`.
    """

    def __init__(
            self, in_chans: int, dim: int, depth: int, patch_size: int, grid_size: Tuple[int, int],
            class_token: bool = False, pos_drop: float = 0., drop_path: Optional[List[float]] = None,
            device=None, dtype=None, **block_args) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.grid_size = grid_size
        self.num_prefix_tokens = int(class_token)
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd)) if class_token else None
        num_positions = grid_size[0] * grid_size[1] + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(
            [Block(dim, drop_path=rate, **block_args, **dd) for rate in drop_path or [0.] * depth])
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tuple[Tensor, int, int]:
        x, height, width = self.patch_embed(x)
        prefix, grid = self.pos_embed[:, :self.num_prefix_tokens], self.pos_embed[:, self.num_prefix_tokens:]
        grid = grid.transpose(1, 2).reshape(1, -1, self.grid_size[0], self.grid_size[1])
        grid = F.interpolate(grid, size=(height, width), mode='bilinear')  # exact when the size is the same
        x = x + grid.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat(((self.cls_token + prefix).expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return x, height, width


class PyramidVisionTransformer(nn.Module):
    """Pyramid Vision Transformer v1 (https://arxiv.org/abs/2102.12122).

    The features are a map, as of any pyramid in timm. With a class token, every position of the map is shifted by the
    same vector, such that its average is the class token: average pooling gives what the classifier reads.

    Args:
        img_size: Image size of the position embeddings; other sizes interpolate them.
        in_chans: Channels of the image.
        num_classes: Number of logits; 0 for pooled features.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden width of the MLPs per stage, relative to the channels.
        depths: Blocks per stage.
        sr_ratios: Reduction of keys and values per stage.
        class_token: A class token in the last stage, read by the classifier. Without, the mean over positions is.
        global_pool: 'avg', or '' for none.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embeddings.
        proj_drop_rate: Dropout after attention and in the MLPs.
        attn_drop_rate: Dropout on the attention.
        drop_path_rate: Stochastic depth rate of the last block.
    """

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            embed_dims: Tuple[int, ...] = (64, 128, 320, 512),
            num_heads: Tuple[int, ...] = (1, 2, 5, 8),
            mlp_ratios: Tuple[float, ...] = (8, 8, 4, 4),
            depths: Tuple[int, ...] = (2, 2, 2, 2),
            sr_ratios: Tuple[int, ...] = (8, 4, 2, 1),
            class_token: bool = True,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        height, width = to_2tuple(img_size)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist()
        stages, self.feature_info = [], []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths)):
            reduction = 4 * 2 ** i
            stages.append(Stage(
                in_chans if i == 0 else embed_dims[i - 1], dim, depth, 4 if i == 0 else 2,
                grid_size=(height // reduction, width // reduction),
                class_token=class_token and i == len(depths) - 1,
                pos_drop=pos_drop_rate, drop_path=[rates.pop(0) for _ in range(depth)],
                num_heads=num_heads[i], mlp_ratio=mlp_ratios[i], sr_ratio=sr_ratios[i],
                attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd))
            self.feature_info.append(dict(module=f'stages.{i}', num_chs=dim, reduction=reduction))
        self.in_chans = in_chans
        self.num_features = embed_dims[-1]
        self.stages = nn.ModuleList(stages)
        self.num_prefix_tokens = self.stages[-1].num_prefix_tokens
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear layers, position embeddings and class token, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Stage):
                trunc_normal_(module.pos_embed, std=.02)
                if module.cls_token is not None:
                    trunc_normal_(module.cls_token, std=.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that are not decayed: the class token, as in the released training."""
        return {name for name, _ in self.named_parameters() if name.endswith('cls_token')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameter groups for layer-wise learning rates."""
        fine = [
            (r'^stages\.(\d+)\.(?:patch_embed|pos_embed|cls_token)', (0,)),
            (r'^stages\.(\d+)\.blocks\.(\d+)', None),
            (r'^norm', (99999,)),
        ]
        return dict(
            stem=r'^stages\.0\.(?:patch_embed|pos_embed)',
            blocks=[(r'^stages\.(\d+)', None), (r'^norm', (99999,))] if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward, to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the pooling if `global_pool` is given.

        Raises:
            ValueError: If `global_pool` is neither 'avg' nor ''.
        """
        if global_pool not in (None, 'avg', ''):
            raise ValueError(f"global_pool={global_pool!r}: expected 'avg' or ''")
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.head.to(device=self.norm.weight.device, dtype=self.norm.weight.dtype).train(self.training)
        self.head_hidden_size = self.num_features

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Union[int, List[int], None] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Patch maps (B, C, H, W) at strides 4, 8, 16 and 32, after the final features; see timm for the arguments.

        `norm` applies the final norm to the last stage, the only one it fits.

        Raises:
            ValueError: If `output_fmt` is not 'NCHW' or a stage does not exist.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'")
        take = take_indices(len(self.stages), indices)
        tokens, intermediates = x, []
        for i, stage in enumerate(self.stages):
            if stop_early and i > max(take):
                break
            tokens, height, width = stage(x)
            x = _to_map(tokens[:, stage.num_prefix_tokens:], height, width)
            if i in take:
                last = i == len(self.stages) - 1
                intermediates.append(
                    _to_map(self.norm(tokens[:, stage.num_prefix_tokens:]), height, width) if norm and last else x)
        if intermediates_only:
            return intermediates
        return self._final_map(tokens, height, width), intermediates

    def prune_intermediate_layers(
            self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> List[int]:
        """Drop what the given intermediates do not need."""
        take = take_indices(len(self.stages), indices)
        if prune_norm or max(take) < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[:max(take) + 1]
        self.num_prefix_tokens = self.stages[-1].num_prefix_tokens
        if prune_head:
            self.head = nn.Identity()
        return take

    def _final_map(self, tokens_BLC: Tensor, height: int, width: int) -> Tensor:
        tokens_BLC = self.norm(tokens_BLC)
        if not self.num_prefix_tokens:
            return _to_map(tokens_BLC, height, width)
        patches_BLC = tokens_BLC[:, 1:]
        return _to_map(patches_BLC + (tokens_BLC[:, :1] - patches_BLC.mean(dim=1, keepdim=True)), height, width)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map (B, num_features, H / 32, W / 32)."""
        tokens, height, width = x, 0, 0
        for stage in self.stages:
            tokens, height, width = stage(x)
            x = _to_map(tokens[:, stage.num_prefix_tokens:], height, width)
        return self._final_map(tokens, height, width)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or pooled features (B, C) with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _to_map(x_BLC: Tensor, height: int, width: int) -> Tensor:
    return x_BLC.transpose(1, 2).reshape(x_BLC.shape[0], -1, height, width)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: PyramidVisionTransformer) -> Dict[str, Tensor]:
    """Resample position embeddings to the model's image size."""
    for i, stage in enumerate(model.stages):
        name = f'stages.{i}.pos_embed'
        if name in state_dict and state_dict[name].shape[1] != stage.pos_embed.shape[1]:
            state_dict[name] = resample_abs_pos_embed(
                state_dict[name], new_size=list(stage.grid_size), num_prefix_tokens=stage.num_prefix_tokens)
    return state_dict


def _cfg(**kwargs):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stages.0.patch_embed.proj', 'classifier': 'head',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/OSVAI/NOAH',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    **{f'{row.vanilla}.osvai_in1k*': _cfg(**weights_at(row.vanilla)) for row in family('pvt')},
    **{f'{row.name}.osvai_in1k*': _cfg(classifier=('head.key', 'head.value'), **weights_at(row.name))
       for row in family('pvt')},
})
_SHARED = dict(
    filter_fn=checkpoint_filter_fn, feature_cfg=dict(feature_cls='getter', out_indices=(0, 1, 2, 3)))
_create_noah = partial(build_noah, twin_args=dict(class_token=False), **_SHARED)


def _create(variant: str, pretrained: bool, **kwargs) -> PyramidVisionTransformer:
    return build_model(PyramidVisionTransformer, variant, pretrained, **_SHARED, **kwargs)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny."""
    return _create('pvt_tiny', pretrained, **kwargs)


@register_model
def pvt_tiny_075(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny, 0.75 of the width."""
    return _create('pvt_tiny_075', pretrained, **dict(dict(embed_dims=(48, 96, 240, 384)), **kwargs))


@register_model
def pvt_tiny_050(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny, half the width."""
    return _create('pvt_tiny_050', pretrained, **dict(dict(embed_dims=(32, 64, 160, 256)), **kwargs))


@register_model
def pvt_tiny_noah(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny with NOAH, N=4, r=1/2."""
    return _create_noah('pvt_tiny_noah', pretrained, **kwargs)


@register_model
def pvt_tiny_075_noah(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny, 0.75 of the width, with NOAH, N=4, r=1/2."""
    return _create_noah('pvt_tiny_075_noah', pretrained, **kwargs)


@register_model
def pvt_tiny_050_noah(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    """PVT-Tiny, half the width, with NOAH, N=4, r=1/2."""
    return _create_noah('pvt_tiny_050_noah', pretrained, **kwargs)

"""NoahHead, the Non-glObal Attentive Head as a module (paper, Section III-B)."""
import math
from numbers import Integral
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from torch import Tensor, nn

from .poca import poca

INPUT_FMTS = ('NCHW', 'NHWC', 'NLC')
MANY_CLASSES = 1000  # from here on, a new head is drawn as in the authors' release
KEY_SCALE, VALUE_SCALE = 1., 0.3  # below: standard deviations of scores and logits, of features with 1

torch.fx.wrap('poca')  # one opaque call for torch.fx


@torch.fx.wrap
def check_input(x: Tensor, in_features: int, input_fmt: str) -> None:
    """Raise ValueError unless `x` has the rank and the width of `input_fmt` (one opaque call for torch.fx)."""
    if torch.jit.is_tracing():  # shapes are tensors then
        return
    channel_dim = 1 if input_fmt == 'NCHW' else -1
    if x.ndim != len(input_fmt) or x.shape[channel_dim] != in_features:
        raise ValueError(
            f'NoahHead: got an input of shape {list(x.shape)}; expected {len(input_fmt)} dimensions in the order '
            f'{input_fmt} with {in_features} channels')


class NoahHead(nn.Module):
    """Non-glObal Attentive Head: takes the place of "pool, then linear" at the end of an image classifier.

    The `in_features` channels are split into a first part of `int(in_features * key_ratio)` channels for the key and
    the rest for the value, and each part into `num_groups` groups. Per group and per class, a softmax over positions
    of the embedded key weights the embedded value; logits are the sum over groups and positions. See Section III-B of
    the paper; Table VI for `num_groups` and `key_ratio`, Table VII for the two splits.

    Shapes:
        Input: (B, C, H, W), (B, H, W, C) or (B, L, C) as `input_fmt` says; any spatial size.
        Output: (B, num_classes); (B, in_features), the mean over positions, when `num_classes` is 0.

    Args:
        in_features: C, channels of the input.
        num_classes: K, number of logits. 0 makes the head a global average pool without parameters.
        num_groups: N, number of POCA blocks.
        key_ratio: Share of the channels that go to the key, strictly between 0 and 1. Not used if not `split_kv`.
        drop_rate: Dropout probability on the value map.
        input_fmt: 'NCHW', 'NHWC' or 'NLC'.
        split_groups: First-level feature split. Without it both embeddings are dense and still give N * K maps.
        split_kv: Second-level feature split. Without it both embeddings read all channels.

    Attributes:
        fused_attn: Whether the maps are computed block by block, as long as key and value are plain convolutions;
            without it, and with hooks on them or in their place, step by step (`compose`), which has derivatives of any
            order. As in timm's attention, `timm.layers.set_fused_attn` says how it starts.

    Raises:
        ValueError: If channels do not divide, `key_ratio` or `drop_rate` is out of range, `input_fmt` is unknown, or
            an input has the wrong rank or width.
    """

    fused_attn: bool = True  # of heads that were pickled before there was a choice

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            num_groups: int = 4,
            key_ratio: float = 0.5,
            drop_rate: float = 0.,
            input_fmt: str = 'NCHW',
            split_groups: bool = True,
            split_kv: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        check_whole('in_features', in_features, 1)
        check_whole('num_classes', num_classes, 0)
        check_whole('num_groups', num_groups, 1)
        if not 0. <= drop_rate < 1.:
            raise ValueError(f'drop_rate={drop_rate} is not in [0, 1)')
        if input_fmt not in INPUT_FMTS:
            raise ValueError(f'input_fmt={input_fmt!r} is not one of {", ".join(INPUT_FMTS)}')
        if split_kv:
            _check_key_ratio(in_features, num_groups if split_groups else 1, key_ratio)
        elif split_groups and in_features % num_groups:
            raise ValueError(f'in_features={in_features} is not a multiple of num_groups={num_groups}')
        self.in_features = in_features
        self.num_classes = self.out_features = num_classes
        self.num_groups = num_groups
        self.key_ratio = key_ratio
        self.drop_rate = drop_rate
        self.input_fmt = input_fmt
        self.split_groups = split_groups
        self.split_kv = split_kv
        self.key_features = int(in_features * key_ratio) if split_kv else in_features
        self.value_features = in_features - self.key_features if split_kv else in_features
        self.conv_groups = num_groups if split_groups else 1
        self.fused_attn = use_fused_attn()
        if num_classes:
            dd = {'device': device, 'dtype': dtype}
            maps = num_groups * num_classes
            self.key = nn.Conv2d(self.key_features, maps, 1, groups=self.conv_groups, **dd)
            self.value = nn.Conv2d(self.value_features, maps, 1, groups=self.conv_groups, **dd)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """First weights. Biases are zero.

        From 1,000 classes on they are those of the authors' release, Kaiming normal by fan-out, which is N * K. For few
        classes that would be large, a standard deviation of 0.22 for K = 10 and N = 4. So below, the scale is one for
        every K, N and width: features of standard deviation 1 get scores of 1 and logits of 0.3. Values are small,
        as few images do not unlearn random logits; keys are not, as a model of tokens that is new as well learns from
        the first step on what the blocks make of different positions. On a trained backbone, and on a convolutional
        one, they are better zero, see `begin_as_pooling`. `docs/numbers.md` has what this was chosen by.
        """
        few = self.deviations_for_few_classes() if 0 < self.num_classes < MANY_CLASSES else {}
        for layer in self.modules():
            if hasattr(layer, 'weight'):
                if layer in few:
                    nn.init.normal_(layer.weight, std=few[layer])
                else:
                    nn.init.kaiming_normal_(layer.weight, mode='fan_out')
                nn.init.zeros_(layer.bias)

    def deviations_for_few_classes(self) -> Dict[nn.Module, float]:
        """Standard deviations of the first weights of the layers that give scores and logits."""
        *_, key = self.key.modules()  # the last layer, where there are several
        *_, value = self.value.modules()
        return {
            key: KEY_SCALE * key.weight[0].numel() ** -0.5,
            value: VALUE_SCALE * (self.num_groups * value.weight[0].numel()) ** -0.5}

    def begin_as_pooling(self) -> None:
        """Make the keys zero: the softmax counts every position alike, until they have learned otherwise."""
        *_, key = self.key.modules()  # the last layer, where there are several
        nn.init.zeros_(key.weight)
        nn.init.zeros_(key.bias)

    @torch.no_grad()
    def begin_as_linear(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        """Take over a classifier of averaged features: the keys are zero, the values its columns.

        Logits are then those of the classifier on the average of the value channels; without `split_kv`, those have all
        channels, and logits are its own.

        Args:
            weight: (K, C), or (K, C, 1, 1) of a 1x1 convolution.
            bias: (K,), or None.

        Raises:
            ValueError: If the shape is another.
        """
        if weight.numel() != self.num_classes * self.in_features or weight.shape[0] != self.num_classes:
            raise ValueError(
                f'a classifier with weights {list(weight.shape)} does not fit; expected '
                f'{[self.num_classes, self.in_features]}')
        weight_KC = weight.flatten(1)[:, self.in_features - self.value_features:]
        if self.split_groups:
            weight_KNC = weight_KC.unflatten(1, (self.num_groups, -1))
        else:  # a block begins with a share of the channels, else they would stay alike
            block_C = torch.arange(self.value_features, device=weight.device) * self.num_groups // self.value_features
            block_N1 = torch.arange(self.num_groups, device=weight.device).unsqueeze(1)
            weight_KNC = weight_KC.unsqueeze(1) * (block_C == block_N1)
        self.begin_as_pooling()
        self.value.weight.copy_(weight_KNC.transpose(0, 1).reshape_as(self.value.weight))
        self.value.bias.zero_()
        if bias is not None:
            self.value.bias.copy_(bias.repeat(self.num_groups) / self.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features, self.input_fmt)
        if self.input_fmt == 'NLC':
            x_BCHW = x.transpose(1, 2).unsqueeze(-1)
        elif self.input_fmt == 'NHWC':
            x_BCHW = x.permute(0, 3, 1, 2)
        else:
            x_BCHW = x
        if not hasattr(self, 'key'):  # TorchScript settles hasattr when it compiles, not num_classes
            return x_BCHW.mean(dim=(2, 3))
        return self.classify(x_BCHW)

    def classify(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes) of a map (B, C, H, W)."""
        if not torch.jit.is_scripting():
            if self.fused_attn and all(
                    is_plain(layer) and layer.groups == self.conv_groups for layer in (self.key, self.value)):
                return poca(
                    x_BCHW, self.key.weight, self.key.bias, self.value.weight, self.value.bias, self.num_groups,
                    self.conv_groups, self.drop_rate, self.training)
        return self.compose(x_BCHW)

    def compose(self, x_BCHW: Tensor) -> Tensor:
        """`classify`, step by step, with all maps in memory: layers are called, so what is put on them has effect."""
        key_BNKL = self.key(x_BCHW[:, :self.key_features]).flatten(2).unflatten(1, (self.num_groups, -1))
        value_BNKL = self.value(x_BCHW[:, self.in_features - self.value_features:]).flatten(2)
        value_BNKL = F.dropout(value_BNKL, self.drop_rate, self.training).unflatten(1, (self.num_groups, -1))
        return self.merge(self.attend(key_BNKL) * value_BNKL)

    def attend(self, key_BNKL: Tensor) -> Tensor:
        """Attention (B, N, K, L) of the embedded key: softmax over positions."""
        return key_BNKL.softmax(dim=-1)

    def merge(self, poca_BNKL: Tensor) -> Tensor:
        """Logits (B, K) of local POCAs (B, N, K, L): their sum."""
        return poca_BNKL.sum(dim=(1, 3))

    def extra_repr(self) -> str:
        return (
            f'in_features={self.in_features}, num_classes={self.num_classes}, num_groups={self.num_groups}, '
            f'key_ratio={self.key_ratio}, drop_rate={self.drop_rate}, input_fmt={self.input_fmt!r}, '
            f'split_groups={self.split_groups}, split_kv={self.split_kv}')


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a 1x1 convolution that does what its weights say, and no more: no hook, parametrization, mask or
    wrapper on it."""
    if type(layer) is not nn.Conv2d or 'forward' in layer.__dict__:
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return not any(hooks) and (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))


def check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f'{name}={value!r} is not a whole number of at least {least}')


def _check_key_ratio(in_features: int, num_groups: int, key_ratio: float) -> None:
    if in_features % num_groups:
        raise ValueError(
            f'in_features={in_features} is not a multiple of num_groups={num_groups}; choose num_groups from '
            f'{[n for n in range(1, 33) if in_features % n == 0]}')
    if in_features < 2 * num_groups:
        raise ValueError(
            f'in_features={in_features} cannot give each of num_groups={num_groups} a key and a value channel')
    if not isinstance(key_ratio, (int, float)) or not 0. < key_ratio < 1.:
        raise ValueError(f'key_ratio={key_ratio!r} is not a number strictly between 0 and 1, like 0.125')
    key_features = int(in_features * key_ratio)
    if key_features % num_groups or not key_features:
        below = key_features // num_groups * num_groups
        accepted = [repr(key_ratio_of(k, in_features)) for k in (below, below + num_groups) if 0 < k < in_features]
        raise ValueError(
            f'key_ratio={key_ratio} gives {key_features} key channels of {in_features}, not a positive multiple of '
            f'num_groups={num_groups}; choose key_ratio={" or ".join(accepted)}')


def key_ratio_of(key_features: int, in_features: int) -> float:
    """The ratio that gives this number of key channels, `int(in_features * ratio)`."""
    ratio = key_features / in_features
    return ratio if int(in_features * ratio) == key_features else math.nextafter(ratio, 1)


def fitting_num_groups(in_features: int, num_params: int) -> int:
    """N by the paper's rule of thumb (Section IV-A), the smaller the backbone the larger N, within what divides.

    It gives the paper's N for all of its 25 models.

    Args:
        in_features: C, channels that the head reads.
        num_params: Parameters of the backbone.
    """
    wanted = 8 if num_params < 5e6 and in_features >= 8 * 128 else 4
    return next(n for n in range(wanted, 0, -1) if in_features % n == 0)


def fitting_key_ratio(in_features: int, num_groups: int) -> float:
    """The ratio that fits the channels and comes closest to 1/8.

    That is the best one of Table VI. The values do without the keys' channels, and all are of use to the classes:
    `docs/numbers.md` has what a larger ratio loses on frozen features and few images.

    Args:
        in_features: C, channels that the head reads.
        num_groups: N.

    Raises:
        ValueError: If `num_groups` is not a positive whole number.
    """
    check_whole('num_groups', num_groups, 1)
    key_features = round(in_features / 8 / num_groups) * num_groups
    key_features = min(max(key_features, num_groups), in_features - num_groups)
    return key_ratio_of(key_features, in_features)

"""The head on any timm model."""
import copy
import functools
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Type

import torch
from timm.data import create_transform, resolve_input_data_config
from timm.layers import ClassifierHead
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers.ablations import head_class
from ..layers.noah_head import MANY_CLASSES, NoahHead, check_whole, fitting_key_ratio, fitting_num_groups

VALUE_RANGE = 'value_range'  # of a note
INITS = ('pooling', 'random', 'classifier')
START_ARGS = ('pretrained_backbone', 'init')  # what weights a model began with, which saved weights do not need
ERRORS = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError)  # what timm's code raises


class NoahModel:
    """Mixed in before a timm model class: the classifier is a `NoahHead`, everything else stays timm's.

    timm's `forward_head` pools, applies what the family puts after the pooling (a norm, a 1x1 layer), and classifies.
    Here every position goes through timm's own `forward_head(pre_logits=True)` as if it were an image by itself.
    Pooling over a single position is that position, so what comes after it is applied per position; then the
    `NoahHead`, at the classifier's place and name, pools. Class and register tokens are left out. Where nothing comes
    after the pooling, evaluation goes without it.

    Attributes:
        noah_cfg: Arguments of the head, remembered across `reset_classifier(0)`.
        noah_place: Name of the classifier, 'fc' say.
        noah_features: What `forward_features` gives.
        noah_only_pools: Whether timm's `forward_head` only pools before it classifies, dropout aside.
    """
    timm_cls: Type[nn.Module]
    noah_cfg: Dict[str, Any]
    noah_place: str
    noah_features: 'Features'
    noah_only_pools: bool

    @property
    def _model_args(self) -> Dict[str, Any]:
        """What timm makes a saved model with again: all that was given, but for what its weights began with."""
        return self.__dict__.get('_model_args', {})

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self.__dict__['_model_args'] = {name: value for name, value in args.items() if name not in START_ARGS}

    def forward_head(self, x: Optional[Tensor] = None, pre_logits: bool = False, **kwargs) -> Tensor:
        """timm's `forward_head`: logits (B, K), or the twin's pooled features (B, C) with `pre_logits`.

        Raises:
            ValueError: If there is a mask of valid patches (NaFlex): NOAH's softmax is over all positions.
        """
        if pre_logits or not self._has_noah_head:
            args = () if x is None else (x,)
            return super().forward_head(*args, pre_logits=pre_logits, **kwargs)
        if x is None or any(value is not None for value in kwargs.values()):
            raise ValueError('a NOAH head takes no mask of valid patches: give the model images of one size')
        fmt, num_prefix_tokens, _ = self.noah_features
        if self.noah_only_pools and not self.training:
            features = x.permute(0, 2, 3, 1) if fmt == 'NCHW' else x if fmt == 'NHWC' else x[:, num_prefix_tokens:]
        else:
            features = super().forward_head(each_position(x, fmt, num_prefix_tokens), pre_logits=True)
            features = together(features, x, fmt, num_prefix_tokens)
        logits = self.get_classifier()(features)
        if num_prefix_tokens and torch.is_grad_enabled():
            # A gradient of zero for layers that write class tokens only (class attention): DDP waits for all of them.
            logits = logits + 0. * x[:, :num_prefix_tokens].sum()
        return logits

    def get_classifier(self) -> nn.Module:
        """The `NoahHead`; an identity after `reset_classifier(0)`, or the layer that was put in its place."""
        return self.get_submodule(self.noah_place)

    @property
    def _has_noah_head(self) -> bool:
        """Whether the classifier reads positions. A layer that replaced the head reads timm's pooled features."""
        return hasattr(self.get_classifier(), 'input_fmt')  # wrappers such as torch.compile's pass attributes on

    def load_state_dict(self, state_dict: Mapping[str, Any], *args, **kwargs):
        """Load weights as `torch.nn.Module` does. Those of the model's TorchScript form are renamed."""
        if any(key.startswith('backbone.') for key in state_dict) and not hasattr(self, 'backbone'):
            state_dict = {
                key.removeprefix('backbone.') if key.startswith('backbone.') else
                f'{self.noah_place}.{key.removeprefix("head.")}': value for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None, **kwargs) -> None:
        """A new NOAH head with the same settings, device and dtype, or with 0 classes the twin's pooled features.

        A new head of few classes begins as pooling, whatever the first one did; `draw_classifier` draws all of it.
        """
        self.draw_classifier(num_classes, global_pool, **kwargs)
        begin(self.get_classifier())

    def draw_classifier(self, num_classes: int, global_pool: Optional[str] = None, **kwargs) -> None:
        """`reset_classifier`, with all first weights drawn: for training from scratch."""
        check_whole('num_classes', num_classes, 0)
        if global_pool is not None:
            kwargs['global_pool'] = global_pool
        super().reset_classifier(0, **kwargs)
        if num_classes:
            weight = next(self.parameters())
            noah_cfg = dict(self.noah_cfg)
            head_cls = head_class(noah_cfg.pop('noah_variant', None))
            width, self.noah_only_pools = _before_classifier(self)
            head = head_cls(
                width, num_classes, input_fmt='NLC' if self.noah_features.fmt == 'NLC' else 'NHWC', **noah_cfg,
                device=weight.device, dtype=weight.dtype)
            self.set_submodule(self.noah_place, head.train(self.training))
            self.num_classes = num_classes

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptableNoah(self) if self._has_noah_head else _twin(self)

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle and deepcopy make it again from timm's.
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _new, (self.timm_cls,), *state


class Features(NamedTuple):
    """What a model's `forward_features` gives: 'NCHW', 'NHWC' or 'NLC', with tokens in front that have no position."""
    fmt: str
    num_prefix_tokens: int
    num_channels: int


def each_position(x: Tensor, fmt: str, num_prefix_tokens: int) -> Tensor:
    """Every position as an image by itself: (B * L, C, 1, 1), (B * L, 1, 1, C) or (B * L, 1 + prefix tokens, C).

    In the place of the prefix tokens is the position once more; so it is what a model pools, whichever tokens it reads.
    """
    if fmt == 'NCHW':
        return x.permute(0, 2, 3, 1).flatten(0, 2).unsqueeze(-1).unsqueeze(-1)
    if fmt == 'NHWC':
        return x.flatten(0, 2).unsqueeze(1).unsqueeze(1)
    return x[:, num_prefix_tokens:].flatten(0, 1).unsqueeze(1).expand(-1, 1 + num_prefix_tokens, -1)


def together(features: Tensor, x: Tensor, fmt: str, num_prefix_tokens: int) -> Tensor:
    """Features of `each_position(x)`, whatever their rank, as (B, H, W, C) of a map `x` or (B, L, C) of tokens `x`."""
    if fmt == 'NCHW':
        return features.reshape(x.shape[0], x.shape[2], x.shape[3], -1)
    if fmt == 'NHWC':
        return features.reshape(x.shape[0], x.shape[1], x.shape[2], -1)
    return features.reshape(x.shape[0], x.shape[1] - num_prefix_tokens, -1)


class ScriptableNoah(nn.Module):
    """A `NoahModel` as a plain composition, as TorchScript knows no `super()`."""

    def __init__(self, model: NoahModel) -> None:
        super().__init__()
        self.backbone = _twin(model)
        self.head = model.get_classifier()
        self.fmt, self.num_prefix_tokens, _ = model.noah_features

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.forward_features(x)
        features = self.backbone.forward_head(each_position(x, self.fmt, self.num_prefix_tokens), pre_logits=True)
        return self.head(together(features, x, self.fmt, self.num_prefix_tokens))


@functools.cache
def _noah_class(timm_cls: Type[nn.Module]) -> Type[nn.Module]:
    return type(f'Noah{timm_cls.__name__}', (NoahModel, timm_cls), {'__module__': __name__, 'timm_cls': timm_cls})


def _new(timm_cls: Type[nn.Module]) -> nn.Module:
    cls = _noah_class(timm_cls)
    return cls.__new__(cls)


def _copy(model: nn.Module, convert) -> nn.Module:
    """A deep copy of the modules, with `convert` of every parameter and buffer instead of a copy."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): convert(tensor) for tensor in tensors})


def _twin(model: NoahModel) -> nn.Module:
    """timm's own class over the same parameters, with its pooling; without the NOAH head, with any other layer."""
    twin = _copy(model, lambda tensor: tensor)
    twin.__class__ = model.timm_cls
    if model._has_noah_head:
        twin.reset_classifier(0)
    return twin


class _Operators(TorchDispatchMode):
    """Notes the names of the operators that run, `self.names`."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which all modules are in the mode of evaluation."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def _before_classifier(model: NoahModel) -> Tuple[int, bool]:
    """Channels that the classifier reads, and whether nothing but pooling comes before it."""
    fmt, num_prefix_tokens, num_channels = model.noah_features
    shapes = dict(NCHW=(num_channels, 1, 1), NHWC=(1, 1, num_channels), NLC=(1 + num_prefix_tokens, num_channels))
    x = next(model.parameters()).new_zeros(1, *shapes[fmt])
    with _evaluating(model), _Operators() as operators:
        features = model.forward_head(x, pre_logits=True)
    width = features.shape[-1] if features.ndim == 3 else features.flatten(1).shape[1]
    # Of one position, all are that position, if no slice took channels. PyTorch 2.8 has a slice in x[:, 0], too.
    return width, width == num_channels and operators.names <= {'alias', 'mean', 'select', 'slice', 'view'}


def attach(model: nn.Module, num_classes: int, features: Features, place: str, **noah_cfg) -> nn.Module:
    """Turn a timm model, in place, into a NOAH model of the same class; see `add_noah_head` for what is checked first.

    Args:
        model: A timm model.
        num_classes: K; 0 keeps timm's pooling and no classifier.
        features: What its `forward_features` gives.
        place: Name of its classifier.
        **noah_cfg: Arguments of `NoahHead`, and `noah_variant`.

    Raises:
        ValueError: If the head cannot be built.
    """
    model.noah_cfg, model.noah_place, model.noah_features = noah_cfg, place, features
    model.__class__ = _noah_class(type(model))
    model.draw_classifier(num_classes)
    return model


def add_noah_head(
        model: nn.Module,
        num_classes: Optional[int] = None,
        num_groups: Optional[int] = None,
        key_ratio: Optional[float] = None,
        drop_rate: float = 0.,
        init: Optional[str] = None,
        **noah_cfg: Any,
) -> nn.Module:
    """Put a NOAH head on a timm model, in place.

    The model stays an instance of its class, with its weights and their names; only the classifier changes, at its
    place. Class and register tokens are left out of the positions. What timm does between pooling and classifier (a
    norm, a 1x1 layer, the MLP of an attention pool) is done per position. Saved by timm, it comes back by
    `timm.create_model` once noah_zoo is imported.

    Args:
        model: A timm model, pretrained or not.
        num_classes: K; the model's own if None.
        num_groups: N. By the paper's rule of thumb if None (Section IV-A: the smaller the backbone the larger N): 8
            below 5M parameters where a group still has 128 channels, else 4; or what divides the channels.
        key_ratio: Share of the channels that go to the key. 1/8 if None, the best one of the paper's Table VI, or what
            comes closest to it; the paper's own models have up to 1/2.
        drop_rate: Dropout probability on the value map. The model's own dropout stays, and is per position.
        init: What the head starts from. 'pooling': keys zero, so that it begins as pooling and a small random linear
            layer. 'random': keys drawn as well, for training from scratch. 'classifier': the classifier that is
            there, for the same classes, with keys zero and values from its columns, so that logits begin as its own
            on the value channels; with `split_kv=False` as its own, where nothing but pooling comes before it.
            None: 'pooling' for fewer than 1,000 classes; from there on 'random', which then is the authors' release.
        **noah_cfg: `split_groups` and `split_kv` of `NoahHead`; `noah_variant`, see `noah_zoo.layers.ablations`.

    Returns:
        `model`.

    Raises:
        ValueError: If the model cannot take the head, with the reason; it is then as it was.
    """
    name = name_of(model)
    if isinstance(model, NoahModel):
        raise ValueError(f'{name}: the model has a NOAH head already; reset_classifier gives it another')
    if not isinstance(model, nn.Module):
        raise ValueError(f'{model!r} is not a model; expected what timm.create_model gives')
    if hasattr(model, '_orig_mod'):
        raise ValueError(
            f'{name}: the model is compiled; add the head to model._orig_mod, or before, and compile that')
    for method in ('forward_features', 'forward_head', 'get_classifier', 'reset_classifier'):
        if not hasattr(model, method):
            raise ValueError(f"{name}: the model has no {method}; expected one of timm's classifiers")
    if num_classes is None:
        num_classes = getattr(model, 'num_classes', 0)
        if not num_classes:
            raise ValueError(f'{name}: the model has no classes of its own; give num_classes=')
    check_init(name, init)
    noah_cfg.update(num_groups=num_groups, key_ratio=key_ratio, drop_rate=drop_rate)
    try:
        check_whole('num_classes', num_classes, 1)
        try:
            trial = _try(_copy(model, _to_meta).eval(), num_classes, noah_cfg)
        except ERRORS:  # a few models look at values, which meta tensors have not
            trial = _try(_copy(model, lambda tensor: tensor).eval(), num_classes, noah_cfg)
    except (ValueError, TypeError, *ERRORS) as error:
        raise ValueError(f'{name}: {error}') from error
    classifier = classifier_of(name, model, trial.get_classifier()) if init == 'classifier' else None
    attach(model, num_classes, trial.noah_features, trial.noah_place, **trial.noah_cfg)
    if classifier:
        model.get_classifier().begin_as_linear(*classifier)
    begin(model.get_classifier(), init)
    _remember(model, name)
    return model


def check_init(name: str, init: Optional[str]) -> None:
    if init not in (None, *INITS):
        raise ValueError(f'{name}: init={init!r} is not one of {", ".join(INITS)}')


def begin(head: nn.Module, init: Optional[str] = None) -> None:
    """Have a head that was drawn begin as pooling, if `init` of `add_noah_head` is that; anything else stays."""
    if isinstance(head, NoahHead) and head.num_classes:
        if init == 'pooling' or init is None and head.num_classes < MANY_CLASSES:
            head.begin_as_pooling()


def classifier_of(
        name: str, model: nn.Module, head: nn.Module, of_token: bool = False) -> Tuple[Tensor, Optional[Tensor]]:
    """Weights and bias of a trained model's linear classifier, for a new head to start from.

    Args:
        name: The model's name, for messages.
        model: The trained model.
        head: The new head.
        of_token: Whether the classifier reads a class token, which the model with the head has not.

    Raises:
        ValueError: If the head cannot start from it, with the reason.
    """
    try:
        classifier = model.get_submodule(find_classifier(model))
        weight, bias = (getattr(classifier, tensor, None) for tensor in ('weight', 'bias'))
        pooled = model
        if weight is not None:
            trial = _copy(model, lambda tensor: tensor).eval()
            features, place, _ = _inspect(trial)
            pooled = attach(trial, 0, features, place)
    except (ValueError, *ERRORS) as error:
        raise _no_start(name, error) from error
    check_classifier(name, head, pooled, weight, of_token)
    if not _is_linear(model, pooled, weight, bias):
        raise _no_start(name, 'its classifier is more than one linear layer (a norm, a second head)')
    return weight, bias


def check_classifier(
        name: str, head: nn.Module, model: NoahModel, weight: Optional[Tensor], of_token: bool = False) -> None:
    """Raise ValueError, with the reason, unless a head can start from a classifier.

    Args:
        name: The model's name, for messages.
        head: The new head.
        model: The model, for its pooling.
        weight: The classifier's weights, if it has some.
        of_token: Whether it reads a class token, which the model has not.
    """
    reason = None
    if of_token:
        reason = 'its classifier reads a class token, not the average over positions'
    elif isinstance(head, nn.Identity):
        reason = 'a head of 0 classes starts from none'
    elif type(head) is not NoahHead:
        reason = f'{type(head).__name__} is not the head of the paper, which is pooling when its keys are zero'
    elif weight is None or weight.ndim not in (2, 4) or weight[0].numel() != weight.shape[1]:
        reason = 'it has no linear classifier'
    elif weight.is_meta:
        reason = 'its weights are on the meta device, so that there are none'
    elif weight.shape[0] != head.num_classes:
        reason = f'its classifier has {weight.shape[0]} classes, the head is to have {head.num_classes}'
    elif not _reads_the_average(model):
        reason = 'its classifier does not read the average over positions'
    if reason:
        raise _no_start(name, reason)


def _no_start(name: str, reason: Any) -> ValueError:
    return ValueError(f"{name}: init='classifier': {reason}; without init= it starts anew")


def _small_map(model: NoahModel) -> Tuple[Tuple[int, ...], Tuple[int, ...]]:
    """The shape of the model's features with four positions, and the dimensions that these are in."""
    fmt, num_prefix_tokens, num_channels = model.noah_features
    return dict(
        NCHW=((1, num_channels, 2, 2), (2, 3)), NHWC=((1, 2, 2, num_channels), (1, 2)),
        NLC=((1, num_prefix_tokens + 4, num_channels), (1,)))[fmt]


@torch.no_grad()
def _is_linear(model: nn.Module, pooled: NoahModel, weight: Tensor, bias: Optional[Tensor]) -> bool:
    """Whether the logits are those of these weights on the pooled features, and of nothing else."""
    shape, _ = _small_map(pooled)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    with _evaluating(model):
        logits = model.forward_head(x).float()
    features = pooled.forward_head(x, pre_logits=True).flatten(1).float()
    expected = nn.functional.linear(features, weight.flatten(1).float(), None if bias is None else bias.float())
    return bool((logits.flatten(1) - expected).abs().max() <= 0.02 * expected.abs().max())


@torch.no_grad()
def _reads_the_average(model: NoahModel) -> bool:
    """Whether timm's pooling looks at the average over positions, and at nothing else: no token, no maximum."""
    fmt, num_prefix_tokens, _ = model.noah_features
    shape, dims = _small_map(model)
    weight = next(model.parameters())
    x, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    average = noise.clone()
    positions = average[:, num_prefix_tokens:] if fmt == 'NLC' else average
    positions.copy_(positions.mean(dims, keepdim=True).expand_as(positions))
    if fmt == 'NLC':
        average[:, :num_prefix_tokens] = 0
    try:
        with _evaluating(model):
            pooled, other, moved = (
                model.forward_head(changed.to(weight), pre_logits=True).float()
                for changed in (x, x + noise - average, x + average))  # `other` has other positions of one average
    except (ValueError, *ERRORS):  # a pooling for features of one size
        return False
    return bool((other - pooled).abs().max() < 0.01 * (moved - pooled).abs().max())


@torch.no_grad()
def _try(trial: nn.Module, num_classes: int, noah_cfg: Dict[str, Any]) -> NoahModel:
    """Put the head on a copy and run it."""
    features, place, x = _inspect(trial)
    attach(trial, 0, features, place)
    width, _ = _before_classifier(trial)
    noah_cfg = dict(noah_cfg)
    if noah_cfg['num_groups'] is None:
        noah_cfg['num_groups'] = fitting_num_groups(width, sum(p.numel() for p in trial.parameters()))
    if noah_cfg['key_ratio'] is None:
        noah_cfg['key_ratio'] = fitting_key_ratio(width, noah_cfg['num_groups'])
    trial.noah_cfg = noah_cfg
    trial.draw_classifier(num_classes)
    trial.forward_head(x)
    return trial


def _to_meta(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to('meta')
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _inspect(trial: nn.Module) -> Tuple[Features, str, Tensor]:
    """What the model's features are, the place of its classifier, and features; its classifier is removed.

    Raises:
        ValueError: If there is no single classifier over one set of positions.
    """
    weight = next(trial.parameters())
    image = weight.new_zeros(1, *input_size_of(trial))
    x = trial.forward_features(image)
    if not isinstance(x, Tensor):
        raise ValueError(f'forward_features gives {len(x)} feature maps; a NOAH head reads one')
    try:
        trial.reset_classifier(1)
    except AssertionError:  # made without pooling, as timm makes models without classes only: the place is there
        pass
    place = find_classifier(trial)
    trial.reset_classifier(0)
    while place.rpartition('.')[0] and not hasattr(*_parent(trial, place)):
        place = place.rpartition('.')[0]  # the layer that timm empties has the classifier inside
    features = _layout(trial, x, image)
    positions = x.numel() // features.num_channels - features.num_prefix_tokens
    if positions < 2:
        raise ValueError(f'no spatial features are left: forward_features gives {list(x.shape)}')
    return features, place, x


def name_of(model: nn.Module) -> str:
    """The model's architecture, of its pretrained cfg; else its class."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def data_config_of(model: nn.Module) -> Dict[str, Any]:
    """timm's preprocessing of a model's pretrained cfg, with the channels and the image size that the model was made
    for; where it has mean and standard deviation of other channels, their mean stands for all."""
    config = resolve_input_data_config(model)
    channels, *size = config['input_size']
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size
    return dict(config, input_size=(channels, *size))


def eval_transform(model: nn.Module, img_size: Optional[int] = None, normalize: bool = True) -> Callable:
    """From an image of the model's mode to what it takes in evaluation, (C, H, W); square, if another size is wanted.
    Without `normalize` it is in uint8 still."""
    config = dict(data_config_of(model), normalize=normalize)
    if img_size:
        config.update(input_size=(config['input_size'][0], img_size, img_size))
    return create_transform(**config)


def value_range_of(model: nn.Module) -> Optional[Tuple[float, float]]:
    """The range of 16-bit and floating-point images that the model's pretrained cfg notes; None if it has none."""
    notes = model.pretrained_cfg.get('notes') or ()
    return next((tuple(map(float, note.split()[1:])) for note in notes if note.startswith(f'{VALUE_RANGE} ')), None)


def input_size_of(model: nn.Module) -> List[int]:
    """Channels, height and width of the images that a timm model was made for; its pretrained cfg may have others."""
    return list(data_config_of(model)['input_size'])


def set_image_size(model: nn.Module, img_size: int) -> None:
    """Make a timm model one for square images of another size, as far as it has to know of it.

    Raises:
        ValueError: If it takes images of its own size only.
    """
    (_, *size), cfg = input_size_of(model), model.pretrained_cfg
    if size == [img_size, img_size]:
        return
    if hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=(img_size, img_size))
    elif cfg.get('fixed_input_size') or cfg.get('dynamic_image_size') is False:
        raise ValueError(
            f'{name_of(model)} is made for images of {size[0]} x {size[1]} pixels; got img_size={img_size}')


def heads_of(model: nn.Module) -> nn.ModuleList:
    """The classifiers of a timm model: one, or the two of one that was distilled."""
    heads = model.get_classifier()
    return nn.ModuleList(heads if isinstance(heads, tuple) else [heads])


def is_convolutional(model: nn.Module) -> bool:
    """Whether most weights of a timm model, its head aside, are those of convolutions."""
    head = {id(p) for p in heads_of(model).parameters()}
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    sizes = [(p.numel(), id(p) in convolutions) for p in model.parameters() if id(p) not in head]
    return 2 * sum(size for size, inside in sizes if inside) > sum(size for size, _ in sizes)


def find_classifier(model: nn.Module) -> str:
    """Name of a timm model's classifier; of two, the one that is not for distillation.

    Raises:
        ValueError: If there are several heads.
    """
    classifier = model.get_classifier()
    if isinstance(classifier, nn.ModuleList):
        raise ValueError(f'the model has {len(classifier)} heads; a NOAH head takes the place of one')
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier
    classifier = classifier.fc if isinstance(classifier, ClassifierHead) else classifier  # that one pools as well
    return next(name for name, module in model.named_modules() if module is classifier)


def _parent(model: nn.Module, place: str) -> Tuple[nn.Module, str]:
    path, _, name = place.rpartition('.')
    for part in path.split('.') if path else ():
        model = getattr(model, part, None)
    return model, name


def _layout(trial: nn.Module, x: Tensor, image: Tensor) -> Features:
    channels = trial.num_features
    if x.ndim == 4 and channels in (x.shape[1], x.shape[-1]):
        return Features('NCHW' if x.shape[1] == channels else 'NHWC', 0, channels)
    if x.ndim != 3 or x.shape[-1] != channels:
        raise ValueError(f'forward_features gives {list(x.shape)}, neither a map nor tokens of {channels} channels')
    prefix = getattr(trial, 'num_prefix_tokens', None)
    if prefix is None:  # some have a class token and do not say so
        height, width = trial.forward_intermediates(image, indices=1, intermediates_only=True)[-1].shape[-2:]
        prefix = x.shape[1] - height * width
        if prefix < 0:
            raise ValueError(f'no spatial features are left: forward_features gives {list(x.shape)}')
    return Features('NLC', prefix, channels)


def classifier_names(model: NoahModel) -> Tuple[str, ...]:
    """The layers of the head, ('fc.key', 'fc.value') say, as timm's pretrained cfg names them."""
    return tuple(
        f'{model.noah_place}.{name}' for name, module in model.get_classifier().named_modules()
        if hasattr(module, 'weight'))


def _remember(model: nn.Module, name: str) -> None:
    """Have timm save the model as one that noah_zoo builds: see noah_zoo/models/noah_any.py."""
    if not getattr(model, 'pretrained_cfg', None):
        return  # made by its class; timm could not save it
    model.pretrained_cfg = model.default_cfg = dict(
        model.pretrained_cfg, architecture='noah', classifier=classifier_names(model))
    model._model_args = dict(getattr(model, '_model_args', {}), backbone=name, **model.noah_cfg)

"""Floor 2: what makes any timm class a NOAH class."""
import functools
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Type

from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    create_model,
    get_pretrained_cfg,
    load_state_dict,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from .catalog import CATALOG, SHIPPED
from .head import NoahHead

HEAD_ARGS = ('num_groups', 'key_ratio', 'drop_rate', 'split_groups', 'split_kv')


class NoahModel:
    """Mixed in before a timm model class: the classifier is a `NoahHead`, everything else stays timm's.

    While there are classes to tell apart, timm's own pooling is switched off (`global_pool=''`, which timm offers) and
    the classifier, at its usual place and name, is a `NoahHead`; so timm's own `forward` is the NOAH model. The pooling
    is back for `forward_head(x, pre_logits=True)` and after `reset_classifier(0)`: then the model is the twin's
    backbone with the twin's pooled features.

    Attributes:
        noah_cfg: Arguments of the head, remembered across `reset_classifier(0)`.
        noah_pool: timm's pooling type, switched off while the head is on.
        noah_place: Name of the classifier, 'fc' say.
    """
    timm_cls: Type[nn.Module]
    noah_cfg: Dict[str, Any]
    noah_pool: Optional[str]
    noah_place: str

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's `forward_head`: logits (B, K), or pooled features (B, C) with `pre_logits`."""
        if pre_logits and self.num_classes:
            return _twin(self, pooled=True).forward_head(x, pre_logits=True)
        return super().forward_head(x, pre_logits=pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new NOAH head with the same settings, device and dtype, or with 0 classes the twin's pooled features."""
        super().reset_classifier(0, self.noah_pool if global_pool is None else global_pool)
        if num_classes:
            self.noah_pool = _pool_type(self)
            super().reset_classifier(0, '')
            weight = next(self.parameters())
            head = NoahHead(
                self.head_hidden_size, num_classes, **self.noah_cfg, device=weight.device, dtype=weight.dtype)
            self.set_submodule(self.noah_place, head.train(self.training))
            self.num_classes = num_classes

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript knows no super(): it gets timm's own class, pooling off, with the NoahHead inside.
        return _twin(self, pooled=False)

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle and deepcopy make it again from timm's.
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _new, (self.timm_cls,), *state


@functools.cache
def _noah_class(timm_cls: Type[nn.Module]) -> Type[nn.Module]:
    return type(f'Noah{timm_cls.__name__}', (NoahModel, timm_cls), {'__module__': __name__, 'timm_cls': timm_cls})


def _new(timm_cls: Type[nn.Module]) -> nn.Module:
    cls = _noah_class(timm_cls)
    return cls.__new__(cls)


def _twin(model: NoahModel, pooled: bool) -> nn.Module:
    """timm's own class over the same parameters and submodules; with its pooling and no classifier if `pooled`."""
    twin = model.timm_cls.__new__(model.timm_cls)
    twin.__dict__.update(model.__dict__, _modules=dict(model._modules))
    if pooled:
        twin.reset_classifier(0, model.noah_pool)
    return twin


def _pool_type(model: nn.Module) -> str:
    pool = model.global_pool
    return getattr(pool, 'pool_type', pool)


def attach(model: nn.Module, num_classes: int, input_fmt: str, **noah_cfg) -> nn.Module:
    """Turn a timm model, in place, into a NOAH model of the same class.

    Args:
        model: A timm model.
        num_classes: K; 0 keeps timm's pooling and no classifier.
        input_fmt: What the model's `forward_features` gives: 'NCHW', 'NHWC' or 'NLC'.
        **noah_cfg: Arguments of `NoahHead`.

    Raises:
        ValueError: If the head cannot be built; `model` is then as it was.
    """
    if getattr(model, 'num_prefix_tokens', 0):
        raise ValueError('the model has a class token; a NOAH model has none (class_token=False)')
    if num_classes:
        NoahHead(model.head_hidden_size, num_classes, input_fmt=input_fmt, device='meta', **noah_cfg)
    classifier = model.get_classifier()
    model.noah_place = next(name for name, module in model.named_modules() if module is classifier)
    model.noah_cfg = dict(noah_cfg, input_fmt=input_fmt)
    model.noah_pool = _pool_type(model)
    model.__class__ = _noah_class(type(model))
    if num_classes:
        model.reset_classifier(num_classes)
    return model


def load_backbone(model: nn.Module, source: str, variant: str, filter_fn: Optional[Callable] = None) -> None:
    """Load everything but the head from the twin's weights, in place.

    A class token that the model does not have is left out, and its position with it.

    Args:
        model: A NOAH model.
        source: A timm name with tag, 'hf-hub:...', 'local-dir:...' or the path of a checkpoint.
        variant: The model's name, for messages.
        filter_fn: timm's checkpoint filter of the family.

    Raises:
        FileNotFoundError: If `source` has a checkpoint's suffix and is no file.
        ValueError: If weights are missing, surplus or of another shape.
    """
    own = model.state_dict()
    if Path(source).suffix in ('.safetensors', '.pt', '.pth', '.bin', '.tar'):
        if not Path(source).is_file():
            raise FileNotFoundError(f'{variant}: pretrained_backbone={source!r} is not a file')
        state_dict = load_state_dict(source, weights_only=True)
    else:
        state_dict = create_model(source, pretrained=True).state_dict()
    if filter_fn is not None:
        state_dict = filter_fn(_without_class_token(state_dict, own), model)
    places = (model.noah_place + '.', 'head_dist.')
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith(places)}
    first_conv = get_pretrained_cfg(variant).first_conv + '.weight'
    if first_conv in state_dict and state_dict[first_conv].shape[1] == 3:
        state_dict[first_conv] = adapt_input_conv(own[first_conv].shape[1], state_dict[first_conv])
    wanted = {k: v for k, v in own.items() if not k.startswith(places)}
    problems = [f'{k} is missing' for k in wanted if k not in state_dict]
    problems += [f'{k} is surplus' for k in state_dict if k not in wanted]
    problems += [
        f'{k} has shape {list(state_dict[k].shape)}, not {list(v.shape)}'
        for k, v in wanted.items() if k in state_dict and state_dict[k].shape != v.shape]
    if problems:
        more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(
            f"{variant}: pretrained_backbone={source!r} does not fit {CATALOG[variant].vanilla}'s backbone: "
            f'{", ".join(problems[:3])}{more}')
    model.load_state_dict(state_dict, strict=False)


def _without_class_token(state_dict: Dict[str, Tensor], own: Dict[str, Tensor]) -> Dict[str, Tensor]:
    state_dict = dict(state_dict)
    for token in [k for k in state_dict if k.endswith('cls_token') and k not in own]:
        del state_dict[token]
        pos_embed = token.replace('cls_token', 'pos_embed')
        state_dict[pos_embed] = state_dict[pos_embed][:, 1:]
    return state_dict


def build_noah(
        variant: str,
        pretrained: bool = False,
        input_fmt: str = 'NCHW',
        twin_args: Optional[Dict[str, Any]] = None,
        filter_fn: Optional[Callable] = None,
        feature_cfg: Optional[Dict[str, Any]] = None,
        pretrained_backbone: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Build a registered NOAH model: timm builds the twin, `attach` gives it the head, timm loads the weights.

    Args:
        variant: A name of the catalog.
        pretrained: Load the weights of the pretrained cfg.
        input_fmt: What the twin's `forward_features` gives.
        twin_args: Arguments of the twin's entry point that the NOAH model fixes.
        filter_fn: timm's checkpoint filter of the family.
        feature_cfg: timm's feature extraction config of the family.
        pretrained_backbone: A timm name with tag, 'hf-hub:', 'local-dir:' or the path of a checkpoint: everything but
            the head is loaded from it.
        **kwargs: `num_groups`, `key_ratio`, `drop_rate`, `split_groups`, `split_kv`, and what timm's class takes.

    Raises:
        ValueError: If the head cannot be built or the backbone's weights do not fit.
        RuntimeError: If no pretrained weights exist.
    """
    row = CATALOG[variant]
    noah_cfg = dict(num_groups=row.num_groups, key_ratio=row.key_ratio, drop_rate=row.drop_rate)
    noah_cfg.update({name: kwargs.pop(name) for name in HEAD_ARGS if name in kwargs})
    cfg = resolve_pretrained_cfg(
        variant, kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None))
    shipped = SHIPPED.get(f'{variant}.{cfg.tag}')
    if shipped is not None:
        kwargs = dict(shipped.model_args, **kwargs)
    if kwargs.get('global_pool') == (kwargs.get('pretrained_model_args') or {}).get('global_pool') == '':
        del kwargs['global_pool']  # a saved config says that the pooling was off, which it is under a NOAH head
    if pretrained and pretrained_backbone:
        raise ValueError(
            f'{variant}: pretrained=True and pretrained_backbone={pretrained_backbone!r} exclude each other')
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"{variant}.{cfg.tag}: no weights are published under this tag yet. Convert the authors' file with "
            f'`python scripts/convert.py FILE --model {variant} --output DIR` and load '
            f"timm.create_model('local-dir:DIR', pretrained=True), or use pretrained=False")

    def build_twin(num_classes: int = 1000, **model_args) -> nn.Module:
        model = model_entrypoint(row.vanilla)(num_classes=0, **dict(twin_args or {}, **model_args))
        try:
            attach(model, num_classes, input_fmt, **noah_cfg)
        except ValueError as error:
            raise ValueError(f'{variant}: {error}') from None
        if pretrained_backbone:
            load_backbone(model, pretrained_backbone, variant, filter_fn)
        return model

    return build_model_with_cfg(
        build_twin, variant, pretrained, pretrained_cfg=cfg, pretrained_filter_fn=filter_fn,
        feature_cfg=dict(feature_cfg or {}), **kwargs)

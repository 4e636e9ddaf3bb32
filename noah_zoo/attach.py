"""Floor 2: what makes any timm class a NOAH class."""
import functools
from typing import Any, Dict, Optional, Type

from torch import Tensor, nn

from .head import NoahHead


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

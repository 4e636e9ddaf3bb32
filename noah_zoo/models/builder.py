"""How a registered model is built, and how its weights come in."""
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    adapt_input_conv,
    build_model_with_cfg,
    create_model,
    get_pretrained_cfg,
    is_model,
    load_state_dict,
    model_entrypoint,
    resolve_model_input_args,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ..catalog import CATALOG, SHIPPED
from ..layers.noah_head import NoahHead, key_ratio_of
from ..text import some
from .attach import (
    Features,
    NoahModel,
    add_noah_head,
    attach,
    begin,
    check_classifier,
    check_init,
    classifier_names,
    classifier_of,
    find_classifier,
    is_convolutional,
)

WEIGHT_PLACES = ('state_dict', 'file', 'hf_hub_id', 'hf_hub_filename', 'url', 'source')  # as timm ranks them
CHECKPOINTS = ('.safetensors', '.pt', '.pth', '.bin', '.tar')
PREPROCESSING = (  # what a pretrained cfg says of the images that its weights are for
    'mean', 'std', 'input_size', 'test_input_size', 'pool_size', 'test_pool_size', 'interpolation', 'crop_pct',
    'test_crop_pct', 'crop_mode')
HEAD_ARGS = ('num_groups', 'key_ratio', 'drop_rate', 'split_groups', 'split_kv', 'noah_variant')

# From a model's name, its cfg and the Hub's cache to the cfg with the place of verified weights, and the arguments that
# these weights imply.
WeightsFinder = Callable[[str, PretrainedCfg, Optional[str]], Tuple[PretrainedCfg, Dict[str, Any]]]
_finder: List[WeightsFinder] = []


class WeightsError(RuntimeError):
    """Pretrained weights that were asked for cannot be had, or are not what they should be."""


def use_weights_finder(finder: WeightsFinder) -> None:
    """Say who finds weights, which is not known here: `noah_zoo.weights` does when it is imported."""
    _finder[:] = [finder]


def build_noah(
        variant: str,
        pretrained: bool = False,
        input_fmt: str = 'NCHW',
        twin_args: Optional[Dict[str, Any]] = None,
        filter_fn: Optional[Callable] = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        pretrained_backbone: Optional[str] = None,
        init: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Build a registered NOAH model: timm builds the twin, `attach` gives it the head, timm loads the weights.

    Args:
        variant: A name of the catalog.
        pretrained: Load the weights of the pretrained cfg.
        input_fmt: What the twin's `forward_features` gives.
        twin_args: Arguments of the twin's entry point that the NOAH model fixes.
        filter_fn: timm's checkpoint filter of the family.
        pretrained_cfg: See timm.
        pretrained_cfg_overlay: See timm.
        pretrained_backbone: A timm name with tag, 'hf-hub:', 'local-dir:' or the path of a checkpoint: everything but
            the head is loaded from it; unless it is a checkpoint or a `pretrained_cfg` is given, images are prepared as
            for these weights.
        init: What a new head starts from, 'pooling', 'random' or 'classifier' (that of `pretrained_backbone`); see
            `add_noah_head`. None is as there if weights are loaded or most weights are of convolutions, else 'random'.
        **kwargs: `num_groups`, `key_ratio`, `drop_rate`, `split_groups`, `split_kv`, `noah_variant` (see
            `noah_zoo.layers.ablations`), and what timm's class takes.

    Raises:
        ValueError: If the head cannot be built or the backbone's weights do not fit.
        WeightsError: If pretrained weights were asked for and cannot be had.
    """
    row = CATALOG[variant]
    noah_cfg = dict(num_groups=row.num_groups, key_ratio=row.key_ratio, drop_rate=row.drop_rate)
    noah_cfg.update({name: kwargs.pop(name) for name in HEAD_ARGS if name in kwargs})
    if not pretrained_cfg or isinstance(pretrained_cfg, str):
        pretrained_cfg = replace(
            resolve_pretrained_cfg(variant, pretrained_cfg),
            **_preprocessing_of(None if pretrained else pretrained_backbone, (row.vanilla, variant)))
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    shipped = SHIPPED.get(f'{variant}.{cfg.tag}')
    if shipped is not None:
        kwargs = dict(shipped.model_args, **kwargs)
    source, init = _backbone_source(variant, pretrained, pretrained_backbone, init, kwargs)

    def build_twin(num_classes: int = 1000, **model_args) -> nn.Module:
        model = model_entrypoint(row.vanilla)(num_classes=0, **dict(twin_args or {}, **model_args))
        if getattr(model, 'num_prefix_tokens', 0):
            raise ValueError(f'{variant}: the model has a class token; the NOAH model has none (class_token=False)')
        try:
            attach(model, num_classes, Features(input_fmt, 0, model.num_features), find_classifier(model), **noah_cfg)
        except ValueError as error:
            raise ValueError(f'{variant}: {error}') from None
        begin(model.get_classifier(), init or _start_of(model, pretrained or source))
        if source:
            load_backbone(model, source, variant, row.vanilla, filter_fn, init)
        return model

    return build_model(build_twin, variant, pretrained, filter_fn, pretrained_cfg=cfg, **kwargs)


def cfg_without_weights(backbone: str, tag: str = '') -> PretrainedCfg:
    """The pretrained cfg of a backbone of timm as that of `noah`, which has no weights of its own."""
    return replace(
        resolve_pretrained_cfg(backbone, tag), tag=None, architecture='noah', **dict.fromkeys(WEIGHT_PLACES))


def build_any(
        backbone: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        pretrained_backbone: Optional[str] = None,
        init: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """Build a timm model with a NOAH head; `add_noah_head` puts it there.

    Args:
        backbone: A timm name; the pretrained cfg is that of its tag, without weights, if none is given.
        pretrained: Load the weights of the pretrained cfg, head and all.
        pretrained_cfg: See timm.
        pretrained_cfg_overlay: See timm.
        pretrained_backbone: As for `build_noah`.
        init: As for `build_noah`.
        **kwargs: As for `build_noah`. `num_groups` and `key_ratio` are by default as of `add_noah_head`.

    Raises:
        ValueError: As `add_noah_head`, or if timm knows no such model or the backbone's weights do not fit.
        WeightsError: If pretrained weights were asked for and cannot be had.
    """
    twin, _, tag = backbone.partition('.')
    if not is_model(twin):
        raise ValueError(f'backbone={backbone!r}: timm knows no such model; see timm.list_models()')
    noah_cfg = {name: kwargs.pop(name) for name in HEAD_ARGS if name in kwargs}
    if not pretrained_cfg or isinstance(pretrained_cfg, str):
        pretrained_cfg = replace(
            cfg_without_weights(twin, tag), **_preprocessing_of(None if pretrained else pretrained_backbone, (twin,)))
    cfg = resolve_pretrained_cfg('noah', pretrained_cfg, pretrained_cfg_overlay)
    source, init = _backbone_source(f'noah on {twin}', pretrained, pretrained_backbone, init, kwargs)
    if pretrained and not any(getattr(cfg, place) for place in WEIGHT_PLACES):
        raise WeightsError(
            f'noah on {twin}: no weights with this head are known; pretrained_backbone={backbone!r} loads all but the '
            f'head, pretrained_cfg_overlay=dict(file=FILE) a file of your own')

    def filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
        convert = getattr(sys.modules[model.timm_cls.__module__], 'checkpoint_filter_fn', None)
        return convert(state_dict, model) if convert else state_dict

    def build_twin(num_classes: int = 1000, **model_args) -> nn.Module:
        model = model_entrypoint(twin)(num_classes=num_classes, **model_args)
        add_noah_head(model, num_classes or 1, init='random', **noah_cfg)
        if not num_classes:
            model.reset_classifier(0)
        begin(model.get_classifier(), init or _start_of(model, pretrained or source))
        if source:
            load_backbone(model, source, f'noah on {twin}', twin, filter_fn, init)
        return model

    return build_model(
        build_twin, 'noah', pretrained, filter_fn, feature_cfg=dict(feature_cls='getter', out_indices=4),
        pretrained_cfg=cfg, **kwargs)


def _backbone_source(
        variant: str, pretrained: bool, pretrained_backbone: Optional[str], init: Optional[str],
        kwargs: Dict[str, Any]) -> Tuple[Optional[str], Optional[str]]:
    """Where the backbone's weights come from, and `init`; what a saved config says of it was before its own weights."""
    check_init(variant, init)
    if not pretrained:
        if init == 'classifier' and pretrained_backbone is None:
            raise ValueError(
                f'{variant}: init={init!r} needs pretrained_backbone=, whose classifier the head starts from')
        return pretrained_backbone, init
    saved = kwargs.get('pretrained_model_args') or {}
    given = dict(pretrained_backbone=pretrained_backbone, init=init)
    given = {name: value for name, value in given.items() if value not in (None, saved.get(name))}
    for name, value in given.items():
        if name == 'pretrained_backbone' or value == 'classifier':
            raise ValueError(
                f'{variant}: pretrained=True and {name}={value!r} exclude each other (--no-pretrained of finetune.py)')
    return None, given.get('init')


def args_of(source: Optional[str]) -> Dict[str, Any]:
    """Name, pretrained cfg and arguments of the model that `create_model` makes of a source of weights; none of a
    checkpoint, which says nothing of its model."""
    return {} if not source or Path(source).suffix in CHECKPOINTS else resolve_model_input_args(source)


def _preprocessing_of(source: Optional[str], names: Sequence[str]) -> Dict[str, Any]:
    """What the pretrained cfg of a backbone's weights says of images; if they are none of the models of these names,
    reid_resnet50 with those of resnet50 say, mean and std only."""
    found = args_of(source)
    if not found:
        return {}
    is_same = not {found['model_name'].partition('.')[0], found.get('backbone')}.isdisjoint(names)
    return {name: found['pretrained_cfg'].get(name) for name in (PREPROCESSING if is_same else PREPROCESSING[:2])}


def _start_of(model: nn.Module, weights: Any) -> Optional[str]:
    """`init` where nothing is said: a model of tokens that learns from nothing begins with random keys."""
    return None if weights or is_convolutional(model) else 'random'


def build_model(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool = False,
        filter_fn: Optional[Callable] = None,
        feature_cfg: Optional[Dict[str, Any]] = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        cache_dir: Optional[str] = None,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with weights that are found and verified first, and loaded whole or not at all.

    Args:
        model_cls: Makes the model of `kwargs`.
        variant: The model's name.
        pretrained: Load the weights of the pretrained cfg.
        filter_fn: timm's checkpoint filter of the family.
        feature_cfg: timm's feature extraction config of the family.
        pretrained_cfg: See timm.
        pretrained_cfg_overlay: See timm.
        cache_dir: The Hub cache to use.
        **kwargs: Arguments of the model.

    Raises:
        WeightsError: If pretrained weights were asked for and cannot be had.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained:
        if not _finder:
            raise WeightsError(f'{variant}: nobody finds its weights; import noah_zoo, or call use_weights_finder')
        cfg, model_args = _finder[0](variant, cfg, cache_dir)
        kwargs = dict(model_args, **kwargs)
    try:
        model = build_model_with_cfg(
            model_cls, variant, pretrained, pretrained_cfg=cfg, feature_cfg=dict(feature_cfg or {}),
            pretrained_filter_fn=_checking(variant, cfg, filter_fn), cache_dir=cache_dir, **kwargs)
    except SafetensorError as error:
        raise WeightsError(f'{variant}: {cfg.file} is damaged or not in the safetensors format: {error}') from None
    for module in model.modules():  # of features_only, the model inside has it too
        (getattr(module, 'pretrained_cfg', None) or {}).pop('state_dict', None)  # loaded, it would only hold the memory
    if isinstance(model, NoahModel) and model.num_classes:
        model.pretrained_cfg['classifier'] = classifier_names(model)
    return model


def _checking(variant: str, cfg: PretrainedCfg, filter_fn: Optional[Callable]) -> Callable:
    """timm's checkpoint filter, and a check: once the classes differ, timm misses no keys and drops any head."""
    heads = tuple(f'{name}.' for name in _names(cfg.classifier))
    first_conv = f'{cfg.first_conv}.weight'  # timm adapts it to the number of channels, or refuses

    def check(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
        own = model.state_dict()
        head = [k for k in own if k.startswith(heads)]
        hint = '' if state_dict.keys() & head or not head else (
            '; they have no NOAH head: pretrained_backbone= loads all but the head from weights of the vanilla twin')
        try:
            if filter_fn is not None:
                state_dict = filter_fn(state_dict, model)
        except (LookupError, RuntimeError) as error:
            raise WeightsError(f'{variant}: the weights are not those of this model: {error}{hint}') from error
        problems = _misfits(state_dict, own, heads, first_conv)
        if problems:
            raise WeightsError(f'{variant}: the weights are not those of this model: {some(problems)}{hint}')
        _check_head(variant, state_dict, model, cfg.num_classes)
        fits = head and all(k in state_dict and state_dict[k].shape == own[k].shape for k in head)
        if fits and model.num_classes != cfg.num_classes:
            raise WeightsError(
                f'{variant}: the weights have a head of {model.num_classes} classes, but would lose it: the pretrained '
                f'cfg says {cfg.num_classes}; add num_classes={model.num_classes} to pretrained_cfg_overlay')
        return state_dict

    return check


def _check_head(variant: str, state_dict: Dict[str, Tensor], model: nn.Module, num_classes: int) -> None:
    """Raise WeightsError, with what to give, if the weights have a NOAH head for as many classes that is another."""
    head = model.get_classifier() if isinstance(model, NoahModel) else None
    if type(head) is not NoahHead or not head.num_classes:
        return
    given = [state_dict.get(f'{model.noah_place}.{name}.weight') for name in ('key', 'value')]
    if any(weight is None or weight.ndim < 2 for weight in given):
        return
    shapes, own_shapes = (
        [list(weight.shape) for weight in weights] for weights in (given, (head.key.weight, head.value.weight)))
    if shapes == own_shapes:
        return
    key_features, value_features = (shape[1] * head.conv_groups for shape in shapes)
    as_many_maps = shapes[0][0] == own_shapes[0][0]
    if head.split_kv and as_many_maps and key_features + value_features == head.in_features:
        args = f'key_ratio={key_ratio_of(key_features, head.in_features)}'
    elif num_classes == model.num_classes:
        args = 'the num_classes, num_groups, key_ratio, split_groups and split_kv that it was made with'
    else:
        return  # a head of other classes, which timm drops
    raise WeightsError(
        f'{variant}: the weights have a head whose key and value are {shapes}, in the model they are {own_shapes}; '
        f'give {args}')


def load_backbone(
        model: nn.Module, source: str, variant: str, twin: str, filter_fn: Optional[Callable] = None,
        init: Optional[str] = None) -> None:
    """Load everything but the head from the twin's weights, in place.

    A class token that the model does not have is left out, and its position with it.

    Args:
        model: A NOAH model.
        source: A timm name with tag, 'hf-hub:...', 'local-dir:...' or the path of a checkpoint.
        variant: The model's name, for messages.
        twin: timm's name of the backbone.
        filter_fn: timm's checkpoint filter of the family.
        init: 'classifier' starts the head from the source's classifier.

    Raises:
        FileNotFoundError: If `source` has a checkpoint's suffix and is no file.
        ValueError: If weights are missing, surplus or of another shape, or there is no classifier to start from.
    """
    own = model.state_dict()
    if Path(source).suffix in CHECKPOINTS:
        if not Path(source).is_file():
            raise FileNotFoundError(f'{variant}: pretrained_backbone={source!r} is not a file')
        trained, state_dict = None, load_state_dict(source, weights_only=True)
    else:
        trained = create_model(source, pretrained=True)
        state_dict = trained.state_dict()
    of_token = any(key.endswith('cls_token') and key not in own for key in state_dict)
    if filter_fn is not None:
        state_dict = filter_fn(_without_class_token(state_dict, own), model)
    cfg = get_pretrained_cfg(twin)
    places = tuple(f'{name}.' for name in (model.noah_place, 'head_dist', *_names(cfg.classifier)))
    classifier, head = None, model.get_classifier()
    if init == 'classifier' and trained:
        classifier = classifier_of(f'{variant}, {source}', trained, head, of_token)
    elif init == 'classifier':
        is_one = _names(cfg.classifier) == (model.noah_place,)  # else a norm or a second head is part of it
        tensors = state_dict if is_one else {}
        classifier = [tensors.get(f'{model.noah_place}.{name}') for name in ('weight', 'bias')]
        check_classifier(f'{variant}, {source}', head, model, classifier[0], of_token)
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith(places)}
    for first_conv in (f'{name}.weight' for name in _names(cfg.first_conv)):
        if first_conv in own and first_conv in state_dict and state_dict[first_conv].shape[1] == 3:
            state_dict[first_conv] = adapt_input_conv(own[first_conv].shape[1], state_dict[first_conv])
    problems = _misfits(state_dict, own, places)
    if problems:
        raise ValueError(
            f"{variant}: pretrained_backbone={source!r} does not fit {twin}'s backbone: "
            f'{some(problems)}')
    model.load_state_dict(state_dict, strict=False)
    if classifier:
        head.begin_as_linear(*classifier)


def _misfits(
        given: Dict[str, Tensor], own: Dict[str, Tensor], heads: Tuple[str, ...], first_conv: str = '') -> List[str]:
    """What keeps weights from a model but for its head; the shape of `first_conv` may be another."""
    problems = [f'{k} is missing' for k in own if k not in given and not k.startswith(heads)]
    problems += [f'{k} is surplus' for k in given if k not in own and not k.startswith(heads)]
    return problems + [
        f'{k} has shape {list(given[k].shape)}, not {list(v.shape)}' for k, v in own.items()
        if k in given and given[k].shape != v.shape and k != first_conv and not k.startswith(heads)]


def _names(entry: Union[str, Tuple[str, ...], None]) -> Tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _without_class_token(state_dict: Dict[str, Tensor], own: Dict[str, Tensor]) -> Dict[str, Tensor]:
    state_dict = dict(state_dict)
    for token in [k for k in state_dict if k.endswith('cls_token') and k not in own]:
        del state_dict[token]
        pos_embed = token.replace('cls_token', 'pos_embed')
        state_dict[pos_embed] = state_dict[pos_embed][:, 1:]
    return state_dict

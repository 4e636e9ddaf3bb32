"""Entry points of torch.hub: every model that noah_zoo registers with timm: `torch.hub.load(REPO, NAME)`.

    torch.hub.list('OWNER/noah_zoo')
    torch.hub.help('OWNER/noah_zoo', 'resnet50_noah')
    torch.hub.load('OWNER/noah_zoo', 'resnet50_noah', pretrained=True)
    torch.hub.load('.', 'resnet50_noah', source='local')

The names come from the catalog, read alone: listing them imports neither timm nor noah_zoo.
"""
import importlib.util
import pathlib

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'filelock', 'gdown']

_NOAH = """{row.vanilla} with a NOAH head: N={row.num_groups}, key ratio {row.key_ratio:g}, dropout {row.drop_rate:g}.

{row.params:,} parameters with 1,000 classes. ImageNet-1k top-1 in the paper: {row.paper.top1} %, that of {row.vanilla}:
{row.vanilla_paper.top1} %.

Images (B, 3, 224, 224), normalised as `timm.data.resolve_data_config({{}}, model=model)` says, give logits
(B, num_classes).

Args:
    pretrained: Load the authors' ImageNet-1k weights, or those of the tag `pretrained_cfg`.
    **kwargs: As of `timm.create_model`: `num_classes`, `in_chans`, `pretrained_cfg`, ... Of the head: `num_groups`,
        `key_ratio`, `drop_rate`, `split_groups`, `split_kv`. `pretrained_backbone` names weights of
        {row.vanilla} that everything but the head is loaded from: a timm name with tag, 'hf-hub:...',
        'local-dir:...' or the path of a checkpoint. `init` is what a new head starts from: 'pooling', 'random' or
        'classifier'; see `add_noah_head`.

Returns:
    The model, in training mode: call `.eval()` before you classify with it.

Raises:
    RuntimeError: If `pretrained` and the weights cannot be had, or the tag is unknown.
    TypeError: If the model has no such argument.
    ValueError: If the head's arguments do not fit its channels.

Example:
    model = torch.hub.load('OWNER/noah_zoo', '{row.name}', pretrained=True)
"""
_SHIPPED = """    model = torch.hub.load('OWNER/noah_zoo', '{name}', pretrained=True, pretrained_cfg='{tag}')
    # These weights lie in the repository: no network. Images (B, {size}), logits (B, {classes}).
"""
_TWIN = """{row.vanilla}, the vanilla twin of {row.name}: same backbone, the usual head.

{row.vanilla_params:,} parameters with 1,000 classes. ImageNet-1k top-1 in the paper: {row.vanilla_paper.top1} %.

Images (B, 3, 224, 224), normalised as `timm.data.resolve_data_config({{}}, model=model)` says, give logits
(B, num_classes).

Args:
    pretrained: Load the authors' ImageNet-1k weights.
    **kwargs: As of `timm.create_model`: `num_classes`, `in_chans`, `drop_rate`, ...

Returns:
    The model, in training mode: call `.eval()` before you classify with it.

Raises:
    RuntimeError: If `pretrained` and the weights cannot be had.
    TypeError: If the model has no such argument.

Example:
    model = torch.hub.load('OWNER/noah_zoo', '{row.vanilla}', pretrained=True)
"""

_ANY = """Any timm model with a NOAH head; 'noah' is the name under which timm saves and loads such models.

Images (B, 3, 224, 224), or of the backbone's own size, normalised as `timm.data.resolve_data_config({}, model=model)`
says, give logits (B, num_classes).

Args:
    pretrained: Load weights of such a model, head and all: give `pretrained_cfg_overlay=dict(file=...)`.
    backbone: A timm name.
    **kwargs: As of `timm.create_model`: `num_classes`, `in_chans`, ... Of the head: `num_groups`, `key_ratio`,
        `drop_rate`, `split_groups`, `split_kv`, `noah_variant`; N and r as by `add_noah_head` if not given.
        `pretrained_backbone` names weights that everything but the head is loaded from: a timm name with tag,
        'hf-hub:...', 'local-dir:...' or the path of a checkpoint. `init` is what a new head starts from: 'pooling',
        'random' or 'classifier'; see `add_noah_head`.

Returns:
    The model, in training mode: call `.eval()` before you classify with it.

Raises:
    RuntimeError: If `pretrained` and the weights cannot be had.
    TypeError: If the model has no such argument.
    ValueError: If timm knows no such backbone, it cannot take the head, or the head's arguments do not fit it.

Example:
    model = torch.hub.load('OWNER/noah_zoo', 'noah', backbone='convnext_tiny', num_classes=37)
"""

_REID = """ResNet-50 with an embedding of 512 channels between pooling and classifier, for person re-identification.

Images (B, 3, 256, 128), normalised as `timm.data.resolve_data_config({}, model=model)` says, give logits
(B, num_classes); `model.forward_head(model.forward_features(images), pre_logits=True)` is the embedding (B, 512).

Args:
    pretrained: Load timm's ImageNet-1k weights of ResNet-50 (a1_in1k); embedding and classifier stay random.
    **kwargs: As of `timm.create_model`: `num_classes`, ...

Returns:
    The model, in training mode.

Raises:
    RuntimeError: If `pretrained` and the weights cannot be had.
    TypeError: If the model has no such argument.

Example:
    model = torch.hub.load('OWNER/noah_zoo', 'reid_resnet50', num_classes=751)
    model = torch.hub.load('OWNER/noah_zoo', 'noah', backbone='reid_resnet50', num_classes=751)
"""


def _read_catalog():
    """noah_zoo/catalog.py as a module of its own, without the package around it."""
    spec = importlib.util.spec_from_file_location('_catalog', pathlib.Path(__file__).parent / 'noah_zoo' / 'catalog.py')
    catalog = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(catalog)
    return catalog


def _describe(name, catalog):
    if name in catalog.OTHERS:
        return dict(noah=_ANY, reid_resnet50=_REID)[name]
    row = next(row for row in catalog.CATALOG.values() if name in (row.name, row.vanilla))
    if name == row.vanilla:
        return _TWIN.format(row=row)
    shipped = [(key.split('.')[1], value) for key, value in catalog.SHIPPED.items() if key.split('.')[0] == name]
    return _NOAH.format(row=row) + ''.join(
        _SHIPPED.format(
            name=name, tag=tag, size=', '.join(map(str, value.input_size)), classes=len(value.label_names))
        for tag, value in shipped)


def _entry(name, doc):
    def create(pretrained=False, **kwargs):
        import timm

        import noah_zoo  # noqa: F401  (registers the models; the one already imported, if there is one)
        return timm.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = doc
    return create


def _entries():
    catalog = _read_catalog()
    return {name: _entry(name, _describe(name, catalog)) for name in catalog.registered()}


globals().update(_entries())

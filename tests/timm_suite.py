r"""pytest plugin: restricts timm's own tests/test_models.py, unchanged, to the models of this project.

    git clone https://github.com/huggingface/pytorch-image-models
    PYTHONPATH=$PWD:$PWD/tests pytest -p timm_suite pytorch-image-models/tests/test_models.py \
        -k 'test_model and not regnetx_002'
"""
import timm
from timm.models import split_model_name_tag

import noah_zoo  # noqa: F401  registers the models
from noah_zoo.catalog import CATALOG

_list_models, _list_pretrained = timm.list_models, timm.list_pretrained
_known_to_timm = {row.vanilla for row in CATALOG.values()} & {
    name for name in _list_models() if not timm.model_entrypoint(name).__module__.startswith('noah_zoo')}
NAMES = {name for row in CATALOG.values() for name in (row.name, row.vanilla)} - _known_to_timm


def list_models(*args, module='', **kwargs):
    """timm's list_models, our names only; a selection by timm's module names selects all of ours."""
    return [name for name in _list_models(*args, **kwargs) if split_model_name_tag(name)[0] in NAMES]


def list_pretrained(*args, **kwargs):
    """timm's list_pretrained, our names only."""
    return [name for name in _list_pretrained(*args, **kwargs) if split_model_name_tag(name)[0] in NAMES]


timm.list_models, timm.list_pretrained = list_models, list_pretrained


def pytest_report_header():
    return f'timm suite: {len(NAMES)} models of noah_zoo'

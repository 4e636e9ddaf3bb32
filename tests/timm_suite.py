r"""pytest plugin: restricts timm's own tests/test_models.py, unchanged, to the models of this project.

    git clone https://github.com/huggingface/pytorch-image-models
    PYTHONPATH=$PWD:$PWD/tests pytest -p timm_suite pytorch-image-models/tests/test_models.py \
        -k 'test_model and not regnetx_002'

Its tests of pretrained weights download the authors' files, and timm's, as users do, but from a Google Drive and a Hub
on loopback, which have files of the same form with other numbers in them.
"""
import io
import os
import shutil
import tempfile

from drive_server import DriveServer
from hub_server import HubServer

_home, _drive, _hub = tempfile.mkdtemp(), DriveServer(), HubServer()
_drive.__enter__()
_hub.__enter__()
os.environ.update({**_hub.env(_home), **_drive.env()})  # before the Hub's client reads it

import timm  # noqa: E402
import torch  # noqa: E402
from released import SHAPES, cheap_state_dict  # noqa: E402
from safetensors.torch import save  # noqa: E402
from timm.models import split_model_name_tag  # noqa: E402

import noah_zoo  # noqa: E402, F401  registers the models
from noah_zoo.catalog import drive_id, registered  # noqa: E402

_list_models, _list_pretrained = timm.list_models, timm.list_pretrained
NAMES = set(registered())
for _name in NAMES & SHAPES.keys():
    _file = io.BytesIO()
    torch.save({'state_dict': cheap_state_dict(_name)}, _file)
    _drive.put(drive_id(_name), _file.getvalue())
_hub.put('timm/resnet50.a1_in1k', {'model.safetensors': save(timm.create_model('resnet50').state_dict())})


def list_models(*args, module='', **kwargs):
    """timm's list_models, our names only; a selection by timm's module names selects all of ours."""
    return [name for name in _list_models(*args, **kwargs) if split_model_name_tag(name)[0] in NAMES]


def list_pretrained(*args, **kwargs):
    """timm's list_pretrained, our names only."""
    return [name for name in _list_pretrained(*args, **kwargs) if split_model_name_tag(name)[0] in NAMES]


timm.list_models, timm.list_pretrained = list_models, list_pretrained


def pytest_report_header():
    return f'timm suite: {len(NAMES)} models of noah_zoo'


def pytest_unconfigure():
    _drive.__exit__(None, None, None)
    _hub.__exit__(None, None, None)
    shutil.rmtree(_home)

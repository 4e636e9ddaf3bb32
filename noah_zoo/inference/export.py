"""Models as files that run without this package: ONNX, torch.export, TorchScript; and ONNX in 8 bits."""
import json
import logging
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.images import read_image
from ..models.attach import data_config_of, eval_transform, name_of
from .predict import label_names, reading_of

_logger = logging.getLogger(__name__)

SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2', 'torchscript': '.pt'}
INSTALL = "pip install 'noah-zoo[export]'"
TOLERANCE = 1e-4  # of the largest logit, or of 1
OPSET = 18  # the oldest that PyTorch writes; what it converts to older ones is not always valid


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        path: The model.
        description: Preprocessing and label names, JSON.
        dynamic_size: Whether it takes images of any size that the backbone takes.
        batch_size: Number of images of a batch; None if it may be any.
        errors: The largest difference to the model's logits, by the shape of the images; empty if not checked.
    """
    path: Path
    description: Path
    dynamic_size: bool
    batch_size: Optional[int]
    errors: Dict[str, float]


def export(
        model: nn.Module, output: Union[str, Path], fmt: str = 'onnx', check: bool = True,
        batch_size: Optional[int] = None, opset: int = OPSET) -> Exported:
    """Write a model as one file, and what to do to an image before it as JSON beside it.

    The input is `images`, (B, C, H, W) in float32; the output `logits`, (B, K). B may be any number, and H and W
    may, as far as the model allows it; one whose padding depends on the size (timm's `Conv2dSame`) gets its own size.
    Nothing is left if anything fails.

    Args:
        model: A timm model, NOAH or not, on the CPU.
        output: The file, '.onnx', '.pt2' or '.pt'; the JSON has its name with the suffix '.json', and is written anew
            where a file of another format stands beside it.
        fmt: 'onnx', 'torch-export' (for `torch.export.load`) or 'torchscript' (for `torch.jit.load`).
        check: Run the file on batches of 1 and 3, on another image size too if it takes one, and compare.
        batch_size: Make all shapes fixed: batches of so many images, of the size that the model was made for. Not for
            'torchscript', which has no shapes.
        opset: Version of ONNX's operators, 18 or later; the IR version is the oldest that has it.

    Raises:
        ImportError: If a package that writes or runs ONNX is missing.
        OSError: If the files cannot be written.
        ValueError: If format, suffix, batch size or opset is not as above, the model cannot be exported, or the file's
            logits are others: more than 1e-4 away, relative to the largest logit or to 1.
    """
    if fmt not in SUFFIXES:
        raise ValueError(f'format {fmt!r} is unknown; choose from {", ".join(SUFFIXES)}')
    output, name, description = Path(output), name_of(model), describe(model)
    if output.suffix != SUFFIXES[fmt]:
        raise ValueError(f'{output}: a file of format {fmt} ends with {SUFFIXES[fmt]}')
    if batch_size is not None and (batch_size < 1 or fmt == 'torchscript'):
        raise ValueError(f'batch_size={batch_size}, format {fmt}: expected 1 or more, and onnx or torch-export')
    if opset < OPSET:
        raise ValueError(f'opset={opset}; expected {OPSET} or later')
    model = model.eval()
    size = description['input_size']
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(batch_size or 2, *size, generator=generator)
    other = torch.randn(1, size[0], size[1] + 32, size[2] + 64, generator=generator)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=output.parent, prefix=f'.{output.name}.') as folder:
        file = Path(folder) / output.name
        dynamic_size = batch_size is None and _takes(model, other)
        if dynamic_size and fmt != 'torchscript' and _pads_by_size(model, x_BCHW[:1], other):
            _logger.info('%s: its padding depends on the size of an image; fixed to %d x %d', name, *size[1:])
            dynamic_size = False
        try:
            try:
                _write(model, x_BCHW, file, fmt, dynamic_size, batch_size, opset)
            except Exception:
                if not dynamic_size or fmt == 'torchscript':
                    raise
                _logger.info('%s: not with images of any size; trying %d x %d', name, *size[1:])
                dynamic_size = False
                _write(model, x_BCHW, file, fmt, dynamic_size, batch_size, opset)
        except ImportError as error:
            raise ImportError(f'{error}; {INSTALL}') from error
        except Exception as error:  # the exporters raise of everything
            raise ValueError(f'{name} cannot be exported as {fmt}: {_first_line(error)}') from error
        errors = {}
        if check:
            batches = [x_BCHW[:1], torch.cat((x_BCHW, -x_BCHW[:1])), *([other] if dynamic_size else [])]
            if batch_size:
                batches = [-x_BCHW]
            errors = _compare(model, file, fmt, batches)
        _place(file, output, {
            **description, 'format': fmt, 'dynamic_image_size': dynamic_size, 'batch_size': batch_size})
    return Exported(output, output.with_suffix('.json'), dynamic_size, batch_size, errors)


def describe(model: nn.Module) -> Dict[str, Any]:
    """What someone without timm has to know of a model: preprocessing, label names.

    An image is resized so that its shorter side has `resize` pixels, or of a model for rectangles so that it just
    covers `resize`, height and width; then its middle is cropped to `crop`, height and width, then its values, of 0 to
    1, are normalised by `mean` and `std`: `crop_mode` 'center' says that, other modes are timm's. 'multilabel' among
    `notes` says that an image may have several classes, each with its sigmoid.
    """
    config = data_config_of(model)
    _, *size = config['input_size']
    resize = [math.floor(side / config['crop_pct']) for side in size]
    return {
        'architecture': name_of(model), 'input_size': list(config['input_size']),
        'resize': resize if size[0] != size[1] else resize[0], 'crop': size, 'crop_pct': config['crop_pct'],
        'crop_mode': config['crop_mode'], 'interpolation': config['interpolation'], 'mean': list(config['mean']),
        'std': list(config['std']), 'notes': list(model.pretrained_cfg.get('notes') or ()),
        'label_names': label_names(model)}


def quantize(path: Union[str, Path], images: Sequence[str], output: Union[str, Path]) -> Exported:
    """Write an exported ONNX file with weights and activations in 8 bits, by onnxruntime's static quantisation.

    Weights are scaled per channel; the range of every activation is that of the calibration images.

    Args:
        path: The file of `export`, its JSON beside it.
        images: Image files to calibrate on, a few hundred like those to come.
        output: The file to write, '.onnx'; its JSON will be beside it.

    Raises:
        DamagedImageError: If an image cannot be read.
        ImportError: If onnx or onnxruntime is missing.
        OSError: If a file cannot be read or written.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ImportError(f'{error}; {INSTALL}') from error
    path, output, model = Path(path), Path(output), ExportedModel(path)
    dynamic_size = model.input_shape[2] is None
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f'.{output.name}.') as folder:
        prepared, file = Path(folder) / 'prepared.onnx', Path(folder) / output.name
        # onnxruntime's inference of symbolic shapes does not get through every model, and changes nothing in the others
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(file), _Calibration(images, model), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            reduce_range=True)  # processors without VNNI add up products in 16 bits, which would overflow
        _place(file, output, {
            **model.pretrained_cfg, 'format': 'onnx', 'dynamic_image_size': dynamic_size,
            'batch_size': model.input_shape[0], 'int8': True})
    return Exported(output, output.with_suffix('.json'), dynamic_size, model.input_shape[0], {})


class _Calibration:
    """Images one by one, as onnxruntime's CalibrationDataReader gives them; a fixed batch is filled with one."""

    def __init__(self, images: Sequence[str], model: 'ExportedModel') -> None:
        self.images, self.transform, self.reading = iter(images), eval_transform(model), reading_of(model)
        self.batch_size = model.input_shape[0] or 1

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        image = next(self.images, None)
        if image is None:
            return None
        x_CHW = self.transform(read_image(image, **self.reading))
        return {'images': x_CHW.repeat(self.batch_size, 1, 1, 1).numpy()}

    def __iter__(self) -> '_Calibration':
        return self

    def __next__(self) -> Dict[str, np.ndarray]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


class ExportedModel(nn.Module):
    """A file of `export` or `quantize`, as far as it can be a timm model: images in, logits out, a pretrained cfg.

    The shapes it takes are the file's own: files of one name with other suffixes share the JSON.

    Raises:
        OSError: If the file or the JSON beside it cannot be read.
        ValueError: If it is not such a file.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'{path}: no such file')
        self.pretrained_cfg = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
        self.num_classes = len(self.pretrained_cfg['label_names'])
        self.run, self.input_shape = load_exported(path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        images, size = x_BCHW.cpu(), self.input_shape[0] or len(x_BCHW)
        padded = nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % size))  # the last batch is whole, too
        logits = torch.cat([self.run(batch) for batch in padded.split(size)])
        return logits[:len(images)].to(x_BCHW.device)


def load_exported(path: Path) -> Tuple[Callable[[Tensor], Tensor], List[Optional[int]]]:
    """A file of `export` or `quantize` as a function of images (B, C, H, W), float32, to logits (B, K).

    With it, the shape that it takes: None where any number will do; all None of TorchScript, which does not say.

    Raises:
        ImportError: If onnxruntime is missing.
        ValueError: If the suffix is none of `SUFFIXES`, or the file is not what that says.
    """
    try:
        if path.suffix == SUFFIXES['onnx']:
            import onnxruntime

            onnxruntime.disable_telemetry_events()
            session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
            shape = session.get_inputs()[0].shape
            return (lambda x_BCHW: torch.from_numpy(session.run(['logits'], {'images': x_BCHW.numpy()})[0]),
                    [side if isinstance(side, int) else None for side in shape])
        if path.suffix == SUFFIXES['torch-export']:
            program = torch.export.load(path)
            images = next(node for node in program.graph.nodes if node.name == program.graph_signature.user_inputs[0])
            return program.module(), [side if isinstance(side, int) else None for side in images.meta['val'].shape]
        if path.suffix == SUFFIXES['torchscript']:
            return torch.jit.load(str(path)), [None] * 4
    except ImportError as error:
        raise ImportError(f'{error}; {INSTALL}') from error
    except Exception as error:  # every format has its own
        raise ValueError(f'{path} is no whole {path.suffix} file: {_first_line(error)}') from error
    raise ValueError(f'{path}: expected one of {", ".join(SUFFIXES.values())}')


def _write(
        model: nn.Module, x_BCHW: Tensor, file: Path, fmt: str, dynamic_size: bool, batch_size: Optional[int],
        opset: int) -> None:
    dims = {} if batch_size else {0: Dim('batch', min=1)}
    if dynamic_size:
        dims.update({2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporters about themselves
        if fmt == 'onnx':
            import onnx

            program = torch.onnx.export(
                model, (x_BCHW,), dynamo=True, dynamic_shapes=(dims,), verbose=False, input_names=['images'],
                output_names=['logits'], opset_version=opset)
            written = program.model.opset_imports['']
            if written != opset:  # PyTorch writes another where it cannot convert its own
                raise ValueError(f'it would have opset {written}, not {opset}')
            program.model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid('', opset)])
            program.save(file, external_data=False)
        elif fmt == 'torch-export':
            torch.export.save(torch.export.export(model, (x_BCHW,), dynamic_shapes=(dims,)), file)
        else:
            torch.jit.script(model).save(str(file))


def _place(file: Path, output: Path, description: Dict[str, Any]) -> None:
    """Move a file from a temporary folder beside its place to there, and its description beside it."""
    text = file.with_name('description')
    text.write_text(json.dumps(description, indent=2) + '\n', encoding='utf-8')
    os.replace(file, output)
    os.replace(text, output.with_suffix('.json'))


def _takes(model: nn.Module, x_BCHW: Tensor) -> bool:
    try:
        model(x_BCHW)
    except Exception:  # an assertion of timm, a shape that does not fit
        return False
    return True


class _Paddings(TorchDispatchMode):
    """Notes by how much the operators pad, `self.noted`."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 'pad' in func.overloadpacket.__name__:
            self.noted.append(list(args[1]))
        return func(*args, **(kwargs or {}))


def _pads_by_size(model: nn.Module, x_BCHW: Tensor, other: Tensor) -> bool:
    """Whether some layer of the model pads the second batch otherwise than the first, or images one pixel larger.

    Where every layer has a padding of its own, the formulas of the sizes grow out of hand with depth, and exporting
    does not come to an end.
    """
    noted = []
    for images in (x_BCHW, other, nn.functional.pad(x_BCHW, (0, 1, 0, 1))):
        with _Paddings() as paddings:
            if _takes(model, images):
                noted.append(paddings.noted)
    return any(paddings != noted[0] for paddings in noted)


def _compare(model: nn.Module, file: Path, fmt: str, batches: List[Tensor]) -> Dict[str, float]:
    (run, _), errors = load_exported(file), {}
    for x_BCHW in batches:
        expected, given = model(x_BCHW), run(x_BCHW)
        shape = ' x '.join(map(str, x_BCHW.shape))
        errors[shape] = (given - expected).abs().max().item()
        if not errors[shape] <= TOLERANCE * max(1, expected.abs().max().item()):
            raise ValueError(
                f'{name_of(model)} as {fmt}: logits of {shape} images differ by {errors[shape]:.1e}, more than '
                f'{TOLERANCE:.0e} of the largest, {expected.abs().max().item():.3g}; nothing was written')
    return errors


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

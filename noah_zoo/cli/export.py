"""Export a model to ONNX, torch.export or TorchScript.

    noah-zoo export --model resnet18_noah --check
    noah-zoo export --model hf-hub:you/photos --format torch-export --output photos.pt2
    noah-zoo export --model resnet18_noah --static --opset 20
    noah-zoo export --int8 calibration/ --dataset fashion_mnist

Batches may have any size, images too where the backbone allows it; with --static all shapes are fixed. --int8 also
writes FILE.int8.onnx. Preprocessing and label names are written to FILE.json.
"""
import json
from pathlib import Path

from . import Parser, file_path, model_name, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        '--model', type=model_name, metavar='NAME',
        help="timm name, 'local-dir:DIR' or 'hf-hub:USER/MODEL' (mobilenetv2_035_noah.fashion_mnist)")
    formats = 'onnx', 'torch-export', 'torchscript'
    parser.add_argument('--format', default='onnx', choices=formats, help='what to write (onnx)')
    parser.add_argument('--output', type=file_path, metavar='FILE', help='file to write (NAME.onnx, here)')
    parser.add_argument(
        '--static', nargs='?', const=1, type=int, metavar='BATCH',
        help='fix all shapes: batches of so many images (1), of the size that the model was made for')
    parser.add_argument(
        '--opset', type=int, metavar='N', help="version of ONNX's operators, 18 or later (18, which old runtimes read)")
    parser.add_argument(
        '--check', action='store_true',
        help='run the file on batches of 1 and 3, or of --static, and compare with PyTorch, to 1e-4')
    parser.add_argument(
        '--int8', nargs='+', type=path, metavar='PATH',
        help='also in 8 bits, calibrated on these images and folders of images')
    parser.add_argument('--dataset', metavar='NAME', help="measure top-1 of what was written, see validate")
    parser.add_argument('--data-dir', type=path, metavar='DIR', help='folder of that dataset')
    args = parser.parse_args(argv)
    for option in ('int8', 'opset'):
        if getattr(args, option) and args.format != 'onnx':
            parser.error(f'--{option} is for --format onnx, not {args.format}')
    return parser, args


def run(parser, args):
    with readable_errors(parser):
        from noah_zoo.files import check_writable
        from noah_zoo.inference.export import OPSET, SUFFIXES, export, quantize
        from noah_zoo.inference.predict import DEFAULT_MODEL, find_images, load_model

        name = args.model or DEFAULT_MODEL
        output = args.output or Path(name.rpartition(':')[2].rstrip('/').rpartition('/')[2] + SUFFIXES[args.format])
        check_writable(output)
        calibration = find_images(args.int8) if args.int8 else []
        written = [export(load_model(name), output, args.format, args.check, args.static, args.opset or OPSET)]
        if calibration:
            written.append(quantize(output, calibration, output.with_suffix('.int8.onnx')))
        for exported in written:
            config = json.loads(exported.description.read_text(encoding='utf-8'))
            batches = f'batches of {exported.batch_size or "any size"}'
            images = 'any size' if exported.dynamic_size else '{1} x {2} only'.format(*config['input_size'])
            print(f'{exported.path}: {exported.path.stat().st_size / 1e6:.2f} MB, {batches}, images of {images}')
            for shape, error in exported.errors.items():
                print(f'  {shape}: largest difference to PyTorch {error:.1e}')
            if args.dataset or args.data_dir:
                from noah_zoo.training.validate import validate

                result = validate(str(exported.path), args.dataset, data_dir=args.data_dir, cpu=True)
                print(f'  top-1 on {result.get("images", "")} images of {result["dataset"]}: {result["top1"]:.2f} %')

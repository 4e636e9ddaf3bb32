"""Draw where a NOAH model looked (Figure 2 of the paper).

    noah-zoo visualize photo.jpg --model resnet18_noah --classes tabby "Egyptian cat" lynx
    noah-zoo visualize noah_zoo/samples/0018_bag.png

The picture has two panels: attention, value and their product of every POCA block for the first class; and one block
for all classes, above Grad-CAM++ of the vanilla twin (pip install 'noah-zoo[visualize]').
"""
import sys
from pathlib import Path

from . import Parser, file_path, model_name, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument('image', metavar='IMAGE', type=file_path)
    parser.add_argument(
        '--model', type=model_name, metavar='NAME',
        help="timm name, 'local-dir:DIR' or 'hf-hub:USER/MODEL' (mobilenetv2_035_noah.fashion_mnist)")
    parser.add_argument('--classes', nargs='+', metavar='CLASS', help='names or indices (the four likeliest)')
    parser.add_argument('--block', type=int, default=1, metavar='N', help='POCA block of the second panel, from 1 (1)')
    parser.add_argument(
        '--twin', metavar='NAME',
        help="model of the same classes for Grad-CAM++, or 'none' (the NOAH model's twin, where it can be had)")
    parser.add_argument(
        '--output', type=file_path, metavar='FILE',
        help='picture to write, PNG without a suffix (IMAGE_attention, here)')
    parser.add_argument('--dpi', type=int, default=150, help='dots per inch of the picture (150)')
    parser.add_argument('--device', default='cpu', help="torch device, 'cuda' say (cpu)")
    return parser, parser.parse_args(argv)


def run(parser, args):
    with readable_errors(parser):
        from matplotlib.backend_bases import FigureCanvasBase

        from noah_zoo.data.images import read_image
        from noah_zoo.files import check_writable, save_figure
        from noah_zoo.inference.predict import DEFAULT_MODEL, reading_of
        from noah_zoo.inference.visualize import draw, find_classes, load_pair

        output = args.output or Path(f'{args.image.stem}_attention.png')
        if not output.suffix:
            output = output.with_suffix('.png')
        formats = FigureCanvasBase.get_supported_filetypes()
        if output.suffix[1:].lower() not in formats:
            raise ValueError(f'{output}: {output.suffix!r} is not one of {", ".join(f".{name}" for name in formats)}')
        check_writable(output)
        model, twin, reason = load_pair(args.model or DEFAULT_MODEL, args.twin, args.device)
        image = read_image(args.image, **reading_of(model))
        if reason:
            print(f'without Grad-CAM++: {reason}', file=sys.stderr)
        classes = args.classes and find_classes(model, args.classes)
        save_figure(draw(model, image, classes, args.block - 1, twin), output, dpi=args.dpi)
        print(output)

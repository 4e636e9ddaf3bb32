"""Convert a checkpoint of the authors' release into a folder that timm loads.

    noah-zoo convert resnet50_noah.pth.tar --model resnet50_noah --output weights/resnet50_noah
"""
from . import Parser, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument('file', type=path, metavar='FILE', help='the released checkpoint, as downloaded')
    parser.add_argument(
        '--model', metavar='NAME', required=True,
        help='timm name of the NOAH model or of its vanilla twin: resnet50_noah, resnet50')
    parser.add_argument(
        '--output', type=path, metavar='DIR', required=True,
        help='folder for model.safetensors and config.json, absent or empty; it appears whole or not at all')
    parser.add_argument(
        '--ema', action='store_true', help='take the averaged weights, which DeiT, Mixer and gMLP files may hold')
    return parser, parser.parse_args(argv)


def run(parser, args):
    with readable_errors(parser, kept=lambda: ', nothing was written'):
        from noah_zoo.weights import convert_file

        folder = convert_file(args.file, args.model, args.output, ema=args.ema)
        location = f'local-dir:{folder}'
        print(f'{args.model}: converted to {folder}')
        print(f'import timm, noah_zoo; model = timm.create_model({location!r}, pretrained=True)')

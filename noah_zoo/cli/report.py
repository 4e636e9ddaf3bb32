"""Compare finished runs over their seeds.

    noah-zoo report results/fashion_mnist
"""
from . import Parser, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument('folders', nargs='+', type=path, metavar='DIR', help='folders of runs of train')
    return parser, parser.parse_args(argv)


def run(parser, args):
    with readable_errors(parser):
        from noah_zoo.training.report import report

        print(report(args.folders))

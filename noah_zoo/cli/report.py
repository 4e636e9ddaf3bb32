"""Compare finished runs over their seeds.

    python scripts/report.py results/fashion_mnist
"""
import argparse


def main(prog: str = 'report.py') -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', metavar='DIR', help='folders of runs of train')
    args = parser.parse_args()

    from noah_zoo.cli import plain_errors

    with plain_errors(parser):
        from noah_zoo.training.report import report

        print(report(args.folders))


if __name__ == '__main__':
    main()

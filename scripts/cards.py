"""Write the model cards, and the table of models in docs/models.md, from the catalog.

    python scripts/cards.py

`--check` writes nothing, and ends with status 1 if a file is out of date, missing or left over.
"""
import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog='cards.py', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, list what is out of date')
    parser.add_argument('--root', metavar='DIR', default=str(ROOT), help='the repository (this one)')
    args = parser.parse_args(argv)

    from noah_zoo.publish.cards import FIX, write_cards

    try:
        stale = write_cards(args.root, check=args.check)
    except (OSError, ValueError) as error:
        parser.exit(2, f'cards.py: error: {error}\n')
    if args.check and stale:
        parser.exit(1, '\n'.join([*stale, f'to bring them up to date: {FIX}']) + '\n')
    print('\n'.join([*stale, 'brought up to date'] if stale else ['up to date']))


if __name__ == '__main__':
    main()

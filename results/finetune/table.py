"""The table of what run.sh has printed.

    python results/finetune/table.py results/finetune/frozen.txt
"""
import argparse
import statistics
from pathlib import Path

from noah_zoo.weights.cards import make_table

HEADS = {'logistic': 'logistic regression', 'linear': 'pooling + linear', 'noah': 'NOAH'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file')
    found = {}
    for line in Path(parser.parse_args().file).read_text(encoding='utf-8').splitlines():
        data, _, head, top1 = line.split()
        found.setdefault(data, {}).setdefault(head, []).append(float(top1))
    print(make_table(('data', 'seeds', *HEADS.values()), [
        (data, str(len(heads['noah'])), *(f'{statistics.mean(heads[head]):.2f}' for head in HEADS))
        for data, heads in found.items()]))


if __name__ == '__main__':
    main()

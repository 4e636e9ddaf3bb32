"""The table of what run.sh has printed.

    python results/finetune/table.py results/finetune/frozen.txt results/finetune/full.txt
"""
import argparse
import statistics
from pathlib import Path

from noah_zoo.text import table

HEADS = {
    'logistic': 'logistic regression', 'linear-frozen': 'linear, frozen', 'noah-frozen': 'NOAH, frozen',
    'noah-r4-frozen': 'r = 1/4, frozen', 'noah-all-frozen': 'split_kv=False, frozen',
    'linear-full': 'linear, all weights', 'noah-full': 'NOAH, all weights', 'noah-r4-full': 'r = 1/4, all weights'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+')
    found = {}
    for file in parser.parse_args().files:
        for line in Path(file).read_text(encoding='utf-8').splitlines():
            data, seed, head, top1 = line.split()
            found.setdefault(data, {}).setdefault(head, {})[seed] = float(top1)
    heads = [head for head in HEADS if any(head in rows for rows in found.values())]
    lines = []
    for data, rows in found.items():
        seeds = set.intersection(*map(set, rows.values()))  # of all heads, as a seed draws the images
        means = (f'{statistics.mean(rows[head][s] for s in seeds):.2f}' if head in rows else '-' for head in heads)
        lines.append((data, str(len(seeds)), *means))
    print(table(('data', 'seeds', *(HEADS[head] for head in heads)), lines))


if __name__ == '__main__':
    main()

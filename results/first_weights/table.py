"""The table of what frozen.py has measured.

    python results/first_weights/table.py results/first_weights/frozen.jsonl
"""
import argparse
import json
from pathlib import Path

from noah_zoo.text import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file')
    rows = [json.loads(line) for line in Path(parser.parse_args().file).read_text(encoding='utf-8').splitlines()]
    found = {(row['groups'], row['head'], row['classes']): row for row in rows}
    classes = sorted({row['classes'] for row in rows})
    lines = []
    for groups, head in dict.fromkeys((row['groups'], row['head']) for row in sorted(rows, key=lambda r: r['groups'])):
        cells = []
        for k in classes:
            row, linear = found.get((groups, head, k)), found.get((0, 'linear', k))
            cells.append('-' if row is None else f'{row["mean"]:.2f}' + (
                f' ({row["mean"] - linear["mean"]:+.2f})' if groups else ''))
        lines.append((f'NOAH, N = {groups}, {head}' if groups else 'pooling + linear', *cells))
    print(table(('head', *(f'K = {k}' for k in classes)), lines))


if __name__ == '__main__':
    main()

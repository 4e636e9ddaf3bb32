"""A part of Fashion-MNIST as folders of PNG files: train/ and validation/ with a folder per class.

    python results/finetune/subset.py --per-class 20 --seed 0 runs/subset

The seed draws the training images; the validation images are the first 200 of each class of the test split.
"""
import argparse
from pathlib import Path

import numpy as np

from noah_zoo.data.fashion_mnist import FASHION_MNIST_DIR, FashionMnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--per-class', type=int, required=True, help='training images of each class')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    for split, source, count in (('train', 'train', args.per_class), ('validation', 'test', 200)):
        images = FashionMnist(FASHION_MNIST_DIR, source)
        rng = np.random.RandomState(args.seed)
        for label, name in enumerate(images.class_names):
            folder = Path(args.folder) / split / name.replace('/', '-')
            folder.mkdir(parents=True, exist_ok=True)
            rows = np.flatnonzero(images.labels == label)
            for row in (rng.permutation(rows) if split == 'train' else rows)[:count]:
                images.read(row)[0].save(folder / f'{row:05}.png')


if __name__ == '__main__':
    main()

"""Ten classes of photographs and drawings with alpha channels, unequal in number: the stamps of Tux Paint, by subject.

    apt-get install tuxpaint-stamps-default
    python results/stamps.py runs/stamps

leaves a folder of links per class, as `--dataset folder` reads it.
"""
import argparse
from pathlib import Path

STAMPS = Path('/usr/share/tuxpaint/stamps')
CLASSES = {
    'bird': 'animals/birds', 'clothing': 'clothes', 'fish': 'animals/fish', 'flower': 'plants/flowers',
    'fruit': 'food/fruit', 'insect': 'animals/insects', 'instrument': 'hobbies/music', 'mammal': 'animals/mammals',
    'tool': 'household/tools', 'vegetable': 'food/vegetables'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='where the class folders are left')
    folder = Path(parser.parse_args().folder)
    if not STAMPS.is_dir():
        parser.exit(2, f'stamps.py: error: {STAMPS} is not there: apt-get install tuxpaint-stamps-default\n')
    for name, place in CLASSES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((STAMPS / place).rglob('*.png')):
            if 'cartoon' not in path.parts and not path.stem.endswith(('_mirror', '_flip')):
                link = folder / name / '-'.join(path.relative_to(STAMPS / place).parts)
                link.unlink(missing_ok=True)
                link.symlink_to(path)


if __name__ == '__main__':
    main()

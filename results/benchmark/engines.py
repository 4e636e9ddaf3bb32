"""Images per second of scripts/train.py beside timm's own train.py: the same model, images and settings, in turn.

    git clone https://github.com/huggingface/pytorch-image-models
    python results/benchmark/engines.py --timm pytorch-image-models --output results/benchmark/engines-h100.json
    python results/benchmark/engines.py --timm pytorch-image-models --quick

Two folders of JPEGs, of noise over colours: of the model's size, which cost nearly nothing to read, and of 500 x 375
pixels, as ImageNet's are. Every run has two epochs; the speed of the second counts, with the loading of images. On a
GPU in bf16, channels last.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SIZES = {'small': None, 'photos': (500, 375)}  # width and height; None is the model's
COMMON = (
    '--opt momentum --lr 0.01 --weight-decay 1e-4 --epochs 2 --warmup-epochs 0 --smoothing 0.1 --channels-last '
    '--scale 0.08 1.0 --color-jitter 0.4').split()


def make_images(folder: Path, count: int, size) -> None:
    """`count` training images of two classes, and a batch to evaluate."""
    rng = np.random.Generator(np.random.PCG64(0))
    for split, number in (('train', count), ('validation', 2)):
        for i in range(number):
            path = folder / split / f'class{i % 2}' / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 255, (size[1] // 16 + 1, size[0] // 16 + 1, 3), np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def run(command) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    if done.returncode:
        sys.exit(f'{" ".join(map(str, command))}\n{done.stdout[-3000:]}')
    return done.stdout


def ours(args, data: Path, count: int, output: Path) -> float:
    """Images per second of scripts/train.py."""
    precision = ('--mixed-precision', 'bf16') if args.device == 'cuda' else ('--mixed-precision', 'no', '--cpu')
    run([ROOT / 'scripts' / 'train.py', '--recipe', 'none', '--model', args.model, '--dataset', 'folder',
         '--data-dir', data, '--output', output, '-b', args.batch_size, '-j', args.workers, '--img-size', args.img_size,
         *precision, *COMMON])
    last = json.loads((output / 'log.jsonl').read_text().splitlines()[-1])
    return count / last['train_seconds']


def theirs(args, data: Path, count: int, output: Path) -> float:
    """Images per second of timm's train.py, by the mean time that it prints with the last update."""
    precision = ('--amp', '--amp-dtype', 'bfloat16') if args.device == 'cuda' else ()
    text = run([
        Path(args.timm) / 'train.py', data, '--model', args.model, '--num-classes', 2, '--output', output,
        '--device', args.device, '-b', args.batch_size, '-j', args.workers, '--img-size', args.img_size, '--pin-mem',
        '--log-interval', 10, *precision, *COMMON])
    return float(re.findall(r'Train: 1 .*\([\d.]+s, +([\d.]+)/s\)', text)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--timm', required=True, metavar='DIR', help="a clone of timm's repository")
    parser.add_argument('--model', default='resnet18', metavar='NAME')
    parser.add_argument('-b', '--batch-size', type=int, default=256, metavar='N')
    parser.add_argument('--updates', type=int, default=40, metavar='N', help='of an epoch')
    parser.add_argument('--img-size', type=int, default=224, metavar='N')
    parser.add_argument('-j', '--workers', type=int, default=max(len(os.sched_getaffinity(0)) - 2, 1), metavar='N')
    parser.add_argument('--repeats', type=int, default=2, metavar='N', help='runs of each, in turn')
    parser.add_argument('--device', default='cuda', metavar='NAME')
    parser.add_argument('--output', metavar='FILE', help='JSON to write')
    parser.add_argument('--quick', action='store_true', help='a smoke run on the CPU: its figures mean nothing')
    args = parser.parse_args()
    if args.quick:
        vars(args).update(
            model='resnet10t', batch_size=4, updates=3, img_size=32, workers=1, repeats=1, device='cpu')
    count, rows = args.batch_size * args.updates, []
    shared = '/dev/shm' if Path('/dev/shm').is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as scratch:
        for name, size in SIZES.items():
            data = Path(scratch) / name
            make_images(data, count, size or (args.img_size, args.img_size))
            speeds = {engine.__name__: [] for engine in (ours, theirs)}
            for repeat in range(args.repeats):
                for engine in (ours, theirs):
                    output = Path(scratch) / f'{name}-{engine.__name__}-{repeat}'
                    speeds[engine.__name__].append(engine(args, data, count, output))
            ratio = statistics.median(speeds['ours']) / statistics.median(speeds['theirs'])
            rows.append({'images': name, 'images_per_second': speeds, 'ours_by_theirs': ratio})
            print(f'{name}: ' + ', '.join(
                f'{engine} {statistics.median(values):,.0f} images/s' for engine, values in speeds.items())
                + f', {ratio:.2f} times as fast', flush=True)
    if args.output:
        device = torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'
        Path(args.output).write_text(json.dumps({
            **vars(args), 'device': device, 'torch': torch.__version__, 'timm_version': timm.__version__, 'rows': rows},
            indent=1) + '\n')


if __name__ == '__main__':
    main()

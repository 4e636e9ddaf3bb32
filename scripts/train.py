"""Floor 5: train a model on one or many devices.

    accelerate launch scripts/train.py --model mobilenetv2_035_noah --dataset fashion_mnist --output runs/first

`python scripts/train.py ...` does the same on one device. The run's folder has the weights in timm's Hub layout:
timm.create_model('local-dir:runs/first', pretrained=True) gives the model.
"""
import argparse
import logging
from typing import Tuple


def parse_args() -> Tuple[argparse.ArgumentParser, argparse.Namespace]:
    from timm.utils import ParseKwargs

    parser = argparse.ArgumentParser(
        prog='train.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', required=True, metavar='NAME', help='timm name, NOAH or vanilla')
    add('--output', required=True, metavar='DIR', help='folder of the run: weights, config.json, log, summary')
    add('--dataset', metavar='NAME', help="'fashion_mnist' (default), 'folder' or 'hfds/NAME'")
    add('--data-dir', metavar='DIR', help='folder of the data')
    add('--train-split', metavar='NAME', help='split to train on (train)')
    add('--val-split', metavar='NAME', help='split to evaluate on (validation)')
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='KEY=VALUE', help='arguments of the model')
    add('--img-size', type=int, metavar='N', help="image size (the model's)")
    add('--crop-pct', type=float, metavar='F', help="share of the image that evaluation crops (the model's)")
    add('--scale', type=float, nargs=2, metavar='F', help='area range of the random crop (0.08 1.0)')
    add('--ratio', type=float, nargs=2, metavar='F', help='aspect ratio range of the random crop (0.75 1.33)')
    add('--hflip', type=float, metavar='P', help='probability of a horizontal flip (0.5)')
    add('--epochs', type=int, metavar='N', help='epochs (100)')
    add('-b', '--batch-size', type=int, metavar='N', help='batch size per process (128)')
    add('--opt', metavar='NAME', help="optimizer of timm.optim ('sgd')")
    add('--lr', type=float, metavar='F', help='learning rate (0.1)')
    add('--momentum', type=float, metavar='F', help='momentum (0.9)')
    add('--weight-decay', type=float, metavar='F', help='weight decay (0.0001)')
    add('--sched', metavar='NAME', help="scheduler of timm.scheduler ('cosine')")
    add('--warmup-epochs', type=int, metavar='N', help='epochs of linear warm-up (0)')
    add('--warmup-lr', type=float, metavar='F', help='learning rate at the start of the warm-up (0)')
    add('--min-lr', type=float, metavar='F', help='learning rate at the end (0)')
    add('--smoothing', type=float, metavar='F', help='label smoothing (0)')
    add('--seed', type=int, metavar='N', help='random seed (0)')
    add('-j', '--workers', type=int, metavar='N', help='data loading processes (2)')
    add('--channels-last', action='store_true', help='NHWC memory layout')
    add('--torchcompile', action='store_true', help='compile the training step')
    add('--cpu', action='store_true', help='do not use an accelerator')
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_args()
    import noah_zoo  # noqa: F401
    from noah_zoo.training import TrainConfig, train

    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        summary = train(TrainConfig(**{k: v for k, v in vars(args).items() if v is not None}))
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        parser.exit(2, f'train.py: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'\ntrain.py: interrupted; {args.output} has the log so far and no finished run\n')
    print(f'{args.model}: test top-1 {summary["top1"]:.2f} after {summary["epoch"]} epochs, {summary["seconds"]:.0f} s')


if __name__ == '__main__':
    main()

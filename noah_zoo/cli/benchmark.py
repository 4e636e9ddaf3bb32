"""Measure speed, memory and accuracy of heads and models.

    noah-zoo benchmark head pairs training growth --device cpu --threads 1 --output results/benchmark
    noah-zoo benchmark head pairs train_pairs training growth --device cuda --dtype bfloat16
    noah-zoo benchmark pairs --models resnet50_noah mobilenetv2_100_noah --repeats 31
    noah-zoo benchmark probe --model resnet50.a1_in1k --dataset folder --data-dir /data/pets --threads 2
    noah-zoo benchmark head pairs training growth probe --quick --output runs/benchmark

head      the head alone, four shapes and other numbers of classes: NOAH, its plain form, that under torch.compile (cuda
          only), pooling and linear, ML-Decoder, CSRA
classes   the head alone for 2 to 1,000 classes, five shapes: forward, a training step on cached features, and one with
          the features' gradient; NOAH, its plain form, pooling and linear
pairs     images/s of the pairs of Table XVII, and the share of speed that is kept, beside the paper's
train_pairs
          images/s of a whole training step, NOAH and vanilla, channels last, and the share of speed that is kept
training  a training step of the head: time, peak memory, memory kept for the backward pass
growth    time and peak memory as the number of classes and of positions grows
probe     heads trained on cached features, each at the best of a few learning rates: test accuracy over seeds,
          parameters, seconds; pooling and linear, NOAH, CSRA, SimPool, Efficient Probing, ML-Decoder, timm's
          AttentionPoolLatent

Each prints a Markdown table, and leaves OUTPUT/WHAT-DEVICE-DTYPE.json and .png, with --busy N ...-busyN.
"""
import argparse
import logging
import shlex

from . import Parser, model_name, path, readable_errors


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add('what', nargs='+', metavar='WHAT', help='head, classes, pairs, train_pairs, training, growth, probe')
    add('--device', metavar='NAME', help='cpu (default) or cuda')
    add('--threads', type=int, metavar='N', help='CPU threads (1)')
    add('--output', type=path, metavar='DIR', help='folder of the results (results/benchmark)')
    add('--repeats', type=int, metavar='N', help='samples of every candidate, taken in turn (21)')
    add('-b', '--batch-size', type=int, nargs='+', metavar='N', dest='batch_sizes',
        help='head: 1 16, on a GPU 1 200, training steps at the largest; classes: 32; pairs: 1, on a GPU 200; '
             'train_pairs: 8, on a GPU 128; training: 64; growth: 16')
    add('--num-classes', type=int, nargs='+', metavar='N', help='of classes (2 10 100 1000) and training (1000 21843)')
    add('--models', nargs='+', metavar='NAME', help='of pairs (all 25) and train_pairs (resnet18_noah)')
    add('--dtype', metavar='NAME', help='float32 (default), or autocast to bfloat16 or float16')
    add('--busy', type=int, metavar='N', help='other processes that take what they get of the processor meanwhile (0)')
    add('--quick', action='store_true', help='a smoke run: few cases, two repeats or seeds; its figures mean nothing')
    add = parser.add_argument_group('probe', 'refused unless probe is among WHAT').add_argument
    add('--model', type=model_name, metavar='NAME', help="timm name, 'hf-hub:...' or 'local-dir:...' (resnet18)")
    add('--pretrained', action=argparse.BooleanOptionalAction, help='with its weights (yes, but in a smoke run)')
    add('--dataset', metavar='NAME', help='as of train, of one class per image (fashion_mnist)')
    add('--data-dir', type=path, metavar='DIR', help='folder of the data')
    add('--input-key', metavar='NAME', help="column of the images, of 'hfds/...'")
    add('--target-key', metavar='NAME', help='column of the labels')
    add('--train-split', metavar='NAME', help='split to train on (train)')
    add('--val-split', metavar='NAME', help='split to test on (validation)')
    add('--val-fraction', type=float, metavar='F',
        help='share of the training split to test on instead, for data without another split')
    add('--train-images', type=int, metavar='N', help='images to train on, as many of each class (all)')
    add('--img-size', type=int, metavar='N', help="image size (the model's)")
    add('--heads', nargs='+', metavar='NAME',
        help='linear, noah, csra, simpool, efficient_probing, ml_decoder, latent (all)')
    add('--seeds', type=int, metavar='N', help='trainings of every head (3)')
    add('--updates', type=int, metavar='N', help='of every training, of 64 images (1000)')
    add('--lrs', type=float, nargs='+', metavar='F',
        help='learning rates to choose from, by a fifth of the training images (2e-4 1e-3 5e-3 2.5e-2); up to '
             'two more where the best is at an end')
    add(
        '--cache-features', type=path, metavar='DIR',
        help='folder where the features are kept (~/.cache/noah_zoo/features)')
    add('-j', '--workers', type=int, metavar='N', help='processes that load images (2)')
    return parser, parser.parse_args(argv)


def run(parser, args):
    command = shlex.join([*parser.prog.split(), *parser.words])
    with readable_errors(parser, RuntimeError, kept=lambda: '; what it was measuring is not written'):
        from noah_zoo.benchmark.run import benchmark

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        for text in benchmark(**vars(args), command=command):
            print(text, flush=True)

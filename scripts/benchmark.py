"""Floor 5: time and memory of the head and of whole models, beside other heads, vanilla twins and the paper's speeds.

    python scripts/benchmark.py head pairs training growth --device cpu --threads 1 --output results/benchmark
    python scripts/benchmark.py head pairs training growth --device cuda
    python scripts/benchmark.py pairs --models resnet50_noah mobilenetv2_100_noah --repeats 31
    python scripts/benchmark.py head pairs training growth --quick --output runs/benchmark

head      the head alone, four shapes: NOAH, its plain form, pooling and linear, ML-Decoder, CSRA
pairs     images/s of the pairs of Table XVII, and the share of speed that is kept, beside the paper's
training  a training step of the head: time, peak memory, memory kept for the backward pass
growth    time and peak memory as the number of classes and of positions grows

Each prints a Markdown table, and leaves OUTPUT/WHAT-DEVICE.json and OUTPUT/WHAT-DEVICE.png.
"""
import argparse
import logging
import shlex
import sys


def parse_args():
    parser = argparse.ArgumentParser(
        prog='benchmark.py', description=__doc__.removeprefix('Floor 5: '),
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add('what', nargs='+', metavar='WHAT', help='head, pairs, training, growth')
    add('--device', metavar='NAME', help='cpu (default) or cuda')
    add('--threads', type=int, metavar='N', help='CPU threads (1)')
    add('--output', metavar='DIR', help='folder of the results (results/benchmark)')
    add('--repeats', type=int, metavar='N', help='samples of every candidate, taken in turn (21)')
    add('-b', '--batch-size', type=int, nargs='+', metavar='N', dest='batch_sizes',
        help='head: 1 16, training steps at the largest; pairs: 1 on a CPU, 200 on a GPU; training: 64; growth: 16')
    add('--num-classes', type=int, nargs='+', metavar='N', help='of training (1000 21843)')
    add('--models', nargs='+', metavar='NAME', help='of pairs (all 25)')
    add('--dtype', metavar='NAME', help='float32 (default), or autocast to bfloat16 or float16')
    add('--quick', action='store_true', help='a smoke run: few cases, two repeats; its figures mean nothing')
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_args()
    command = shlex.join(['python', 'scripts/benchmark.py', *sys.argv[1:]])
    try:
        from noah_zoo.benchmark import benchmark

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        for text in benchmark(**vars(args), command=command):
            print(text, flush=True)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(2, f'benchmark.py: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, '\nbenchmark.py: interrupted; what it was measuring is not written\n')


if __name__ == '__main__':
    main()

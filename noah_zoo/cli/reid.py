"""Person re-identification on the layout of Market-1501: train, evaluate.

    python scripts/reid.py train --data-dir market1501 --model reid_resnet50 --output runs/reid
    python scripts/reid.py train --data-dir market1501 --model noah --model-kwargs backbone=reid_resnet50 \\
        pretrained_backbone=resnet50.a1_in1k --recipe reid_finetune --output runs/reid_noah
    python scripts/reid.py evaluate --model local-dir:runs/reid_noah/best --data-dir market1501 --picture ranking.png

train      as train.py, with all of its flags; the recipe is the paper's from-scratch one, or 'reid_finetune'
evaluate   rank-1, -5, -10 and mAP of the queries in the gallery, and a picture of what was found
"""
import argparse
import logging
import os
import sys


def parse_evaluate(prog: str):
    parser = argparse.ArgumentParser(prog=f'{prog} evaluate', argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add('--model', required=True, metavar='NAME', help="a timm name with weights, 'local-dir:RUN/best' say")
    add('--data-dir', required=True, metavar='DIR', help='folder of query/ and bounding_box_test/')
    add('--picture', metavar='FILE', help='PNG to draw queries and their ten nearest into')
    add('--queries', type=int, metavar='N', dest='pictured', help='queries in the picture (6)')
    add('-b', '--batch-size', type=int, metavar='N', help='images at a time (64)')
    add('-j', '--workers', type=int, metavar='N', help='data loading processes (2)')
    add('--cpu', action='store_true', help='do not use an accelerator')
    return parser, parser.parse_args(sys.argv[2:])


def evaluate(prog: str) -> None:
    parser, args = parse_evaluate(prog)
    from noah_zoo.cli import plain_errors

    with plain_errors(parser, RuntimeError):
        from accelerate import PartialState

        from noah_zoo.training.validate import validate

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        figures = validate(task='reid', dataset='market1501', **vars(args))
        PartialState().destroy_process_group()
        if os.environ.get('RANK', '0') != '0':
            return
        print('; '.join(f'{name} {figures[name]:.2f} %' for name in ('rank1', 'rank5', 'rank10', 'mAP')) +
              f' of {figures["queries"]} queries')


def main(prog: str = 'reid.py') -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else ''
    if what == 'evaluate':
        evaluate(prog)
    elif what == 'train':
        from noah_zoo.cli.train import main as train

        del sys.argv[1]
        train(f'{prog} train', __doc__, task='reid', dataset='market1501', recipe='reid')
    elif what in ('-h', '--help'):
        print(__doc__)
    else:
        sys.exit(f'{prog}: error: {what!r} is not one of train, evaluate; see --help')


if __name__ == '__main__':
    main()

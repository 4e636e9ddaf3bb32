"""Train and evaluate person re-identification on Market-1501.

    noah-zoo reid train --data-dir market1501 --model reid_resnet50 --output runs/reid
    noah-zoo reid train --data-dir market1501 --model noah --model-kwargs backbone=reid_resnet50 \\
        pretrained_backbone=resnet50.a1_in1k --recipe reid_finetune --output runs/reid_noah
    noah-zoo reid evaluate --model local-dir:runs/reid_noah/best --data-dir market1501 --picture ranking.png

train      `train` with all its flags; the recipe is the paper's from-scratch recipe, or 'reid_finetune'
evaluate   rank-1, -5, -10 and mAP of the queries in the gallery, and a picture of the nearest images
"""
import argparse
import logging
import os

from . import Parser, model_name, path, readable_errors, train, use_device


def parse_args(argv, prog):
    parser = Parser(prog=prog, usage='%(prog)s {train,evaluate} ...', description=__doc__)
    parser.add_argument('action', choices=('train', 'evaluate'), help=argparse.SUPPRESS)
    action = parser.parse_args(argv[:1]).action
    if action == 'train':
        return train.parse_args(
            argv[1:], f'{prog} train', __doc__, task='reid', dataset='market1501', recipe='reid')
    parser = Parser(prog=f'{prog} evaluate', argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        '--model', required=True, type=model_name, metavar='NAME',
        help="a timm name with weights, or 'local-dir:RUN/best'")
    add('--data-dir', required=True, type=path, metavar='DIR', help='folder of query/ and bounding_box_test/')
    add('--picture', type=path, metavar='FILE', help='PNG to draw queries and their ten nearest into')
    add('--queries', type=int, metavar='N', dest='pictured', help='queries in the picture (6)')
    add('-b', '--batch-size', type=int, metavar='N', help='images at a time (64)')
    add('-j', '--workers', type=int, metavar='N', help='data loading processes (2)')
    add('--device', metavar='NAME', help="torch device, 'cpu' or 'cuda:1' (the GPU, if there is one)")
    add('--cpu', action='store_true', help='as --device cpu')
    return parser, parser.parse_args(argv[1:])


def run(parser, args):
    if hasattr(args, 'output'):
        return train.run(parser, args)
    with readable_errors(parser, RuntimeError):
        from accelerate import PartialState

        from noah_zoo.training.validate import validate

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        use_device(args)
        figures = validate(task='reid', dataset='market1501', **vars(args))
        PartialState().destroy_process_group()
        if os.environ.get('RANK', '0') != '0':
            return
        print('; '.join(f'{name} {figures[name]:.2f} %' for name in ('rank1', 'rank5', 'rank10', 'mAP')) +
              f' of {figures["queries"]} queries')

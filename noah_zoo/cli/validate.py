"""Evaluate a pretrained model on a dataset.

    noah-zoo validate --model resnet50_noah --dataset folder --data-dir /data/imagenet
    noah-zoo validate --model mobilenetv2_035_noah.fashion_mnist --dataset fashion_mnist
    accelerate launch -m noah_zoo validate --model local-dir:runs/pets/best --dataset folder --data-dir /data/pets

For the authors' weights, the paper's top-1 and top-5 are printed alongside.
"""
import argparse
import json
import logging
import os

from . import Parser, model_name, path, readable_errors, use_device


def parse_args(argv, prog):
    parser = Parser(prog=prog, description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add(
        '--model', required=True, type=model_name, metavar='NAME',
        help="timm name, 'hf-hub:...', 'local-dir:...', or an exported file")
    add('--dataset', metavar='NAME',
        help="'folder' (default with --data-dir), 'fashion_mnist', 'csv', 'hfds/NAME', 'hfids/NAME' or 'wds/...'")
    add('--data-dir', type=path, metavar='DIR', help='folder of the data')
    add('--task', metavar='NAME', help='multiclass (default), multilabel or reid')
    add('--split', metavar='NAME', help='split to evaluate on (validation)')
    add('--input-key', metavar='NAME', help="column of the images, of 'hfds/' and 'hfids/' ('image')")
    add('--target-key', metavar='NAME', help="column of the labels ('label')")
    add('--label-separator', metavar='TEXT', help="text between the labels of an image, of 'csv' (';')")
    add('--without-labels', action='store_true', help="keep images of 'coco' that have no annotation")
    add('-b', '--batch-size', type=int, metavar='N', help='batch size per process (64)')
    add('-j', '--workers', type=int, metavar='N', help='data loading processes (2)')
    add('--img-size', type=int, metavar='N', help="image size (the model's)")
    add('--device', metavar='NAME', help="torch device, 'cpu' or 'cuda:1' (the GPU, if there is one)")
    add('--cpu', action='store_true', help='as --device cpu')
    add('--json', action='store_true', help='print JSON')
    return parser, parser.parse_args(argv)


def run(parser, args):
    with readable_errors(parser, RuntimeError):
        from accelerate import PartialState

        from noah_zoo.tasks import find_task
        from noah_zoo.text import finite
        from noah_zoo.training.validate import validate

        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        use_device(args)
        settings = dict(vars(args))
        as_json = settings.pop('json', False)
        result = validate(**settings)
        PartialState().destroy_process_group()  # threads of a group that is left alive may abort the process as it ends
        if os.environ.get('RANK', '0') != '0':
            return
        if as_json:
            print(json.dumps(finite(result), indent=2, allow_nan=False))
            return
        print(f'{result["model"]} on {result["dataset"]} [{result["split"]}]')
        labels = find_task(settings.get('task', 'multiclass')).figures
        for key, value in result.items():
            if isinstance(value, float) and key != 'val_loss' and not key.endswith('_top3'):
                paper = result.get('paper', {})
                more = f'   paper, on ImageNet-1k: {paper[key]:.2f} %' if key in paper else ''
                more += f'   of the top 3: {result[f"{key}_top3"]:.2f} %' if f'{key}_top3' in result else ''
                print(f'{labels.get(key, key)}: {value:.2f} %{more}')
        for row in result.get('per_class', ()):
            print('  '.join(f'{key} {value}' for key, value in row.items()))
        if 'val_loss' in result:
            print(f'cross-entropy: {result["val_loss"]:.4f}')

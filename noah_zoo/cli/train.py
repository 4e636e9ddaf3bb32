"""Train a model on one or many devices.

    noah-zoo train --model resnet18_noah --dataset folder --data-dir /data/imagenet --output runs/resnet18_noah
    accelerate launch -m noah_zoo train --model deit_tiny_patch16_224_noah --dataset folder \\
        --data-dir /data/imagenet --output runs/short --epochs 100 --batch-size 512 --device-batch-size 64 \\
        --mixup 0 --model-ema-decay none

The model determines the recipe: the paper's for its 25 models and their vanilla baselines, plain defaults for others. A
flag overrides the recipe; 'none' and --no-... switch a setting off. `accelerate launch` trains on several devices.
"""
import argparse
import ast
import dataclasses
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, get_args

from ..config import TrainConfig
from ..recipes import RECIPES, Recipe
from . import Parser, model_name, path, readable_errors, use_device


def or_none(kind: Callable) -> Callable:
    def convert(text: str) -> Any:
        return None if text.lower() == 'none' else kind(text)
    convert.__name__ = f"{kind.__name__} or 'none'"  # for argparse's message
    return convert


COMMON = (  # shown first by --help
    'model', 'output', 'dataset', 'data_dir', 'val_fraction', 'epochs', 'batch_size', 'lr', 'img_size', 'pretrained',
    'freeze', 'no_aug', 'aa', 'mixup', 'mixed_precision', 'workers', 'resume')
SHORT = {'batch_size': ['-b'], 'workers': ['-j']}
MORE = {
    'model': dict(type=model_name),
    'output': dict(type=path, metavar='DIR'),
    'data_dir': dict(type=path, metavar='DIR'),  # 'none' is a folder's name
    'split_from': dict(type=or_none(path), metavar='DIR'),
    'resume': dict(type=or_none(path), metavar='auto|DIR'),
    'smoke': dict(nargs='?', const=3),
    'no_aug': dict(action='store_true'),  # Python 3.14 has no pairs --no-aug and --no-no-aug
    'cache_features': dict(nargs='?', type=or_none(path), const='~/.cache/noah_zoo/features', metavar='DIR')}
METAVARS = {int: 'N', float: 'F', str: 'NAME'}


class KeyValue(argparse.Action):
    """KEY=VALUE, the value a Python literal, else a string; a repeated flag adds to the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest, {}))
        for word in values:
            key, equals, text = word.partition('=')
            if not (key and equals):
                parser.error(f'argument {option_string}: expected KEY=VALUE, not {word!r}')
            try:
                pairs[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError):
                pairs[key] = model_name(text)
        setattr(namespace, self.dest, pairs)


class LowHigh(argparse.Action):
    """Two numbers, or 'none'."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            low, high = (None, None) if [text.lower() for text in values] == ['none'] else map(float, values)
        except ValueError:
            parser.error(f"argument {option_string}: expected two numbers or 'none', not {' '.join(values)}")
        if low is not None and not low < high:
            parser.error(f'argument {option_string}: expected LOW < HIGH, not {low:g} {high:g}')
        setattr(namespace, self.dest, None if low is None else (low, high))


def argument_of(kind: Any) -> Dict[str, Any]:
    """The arguments of `add_argument` for a field of this type."""
    if kind in (bool, Optional[bool]):
        return dict(action=argparse.BooleanOptionalAction)
    if kind in METAVARS:
        return dict(type=kind, metavar=METAVARS[kind])
    if kind == Optional[Tuple[float, float]]:
        return dict(nargs='+', action=LowHigh, metavar=('LOW', 'HIGH'))
    if kind == Dict[str, Any]:
        return dict(nargs='*', action=KeyValue, metavar='KEY=VALUE')
    if type(None) in get_args(kind):
        return dict(type=or_none(get_args(kind)[0]), metavar=METAVARS[get_args(kind)[0]])
    return dict(type=get_args(kind)[0], nargs=len(get_args(kind)), metavar=METAVARS[get_args(kind)[0]])  # a tuple


def parse_args(argv, prog, description=__doc__, **defaults):
    """Return the parser, and a namespace of the given flags over `defaults`: the recipe decides the other settings."""
    parser = Parser(
        prog=prog, usage='%(prog)s --model NAME --output DIR [flags]', description=description,
        argument_default=argparse.SUPPRESS)
    common = parser.add_argument_group('common flags')
    others = parser.add_argument_group('other flags')
    recipe = RECIPES.get(defaults.get('recipe'))
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    of_recipe = {field.name for field in dataclasses.fields(Recipe)}
    others.add_argument(
        '--recipe', metavar='NAME', choices=['auto', 'none', *RECIPES],
        help="the settings that are not given: 'auto' is the recipe of the model, 'none' plain defaults; else one of "
             f"{', '.join(RECIPES)} ({defaults.get('recipe', 'auto')})")
    for name in (*COMMON, *(name for name in fields if name not in COMMON)):
        field = fields[name]
        required = field.default is field.default_factory
        default = {**vars(recipe or Recipe()), **defaults}.get(name, field.default)
        text = field.metadata['help']
        if name in of_recipe and not recipe:
            text += " (the recipe's)"
        elif not required and default not in (None, False):
            text += f' ({default})'
        (common if name in COMMON else others).add_argument(
            *SHORT.get(name, []), '--' + name.replace('_', '-'), help=text.replace('%', '%%'),
            required=required and '--check-data' not in argv, **{**argument_of(field.type), **MORE.get(name, {})})
    common.add_argument(
        '--device', metavar='NAME', help="torch device, 'cpu' or 'cuda:1' (the GPU, if there is one)")
    common.add_argument(
        '--check-data', action='store_true',
        help='only read annotations and every image once and report what is wrong; needs neither --model nor --output')
    return parser, argparse.Namespace(**{**defaults, **vars(parser.parse_args(argv))})


def run(parser, args):
    def kept() -> str:
        begun = hasattr(args, 'output') and Path(args.output).is_dir()
        return f'; with --resume auto it goes on from the newest checkpoint in {args.output}' if begun else ''

    with readable_errors(parser, RuntimeError, FloatingPointError, kept=kept):
        from accelerate.utils import get_int_from_env

        from noah_zoo.data.factory import check_data
        from noah_zoo.data.images import DamagedImageError
        from noah_zoo.tasks import find_task
        from noah_zoo.text import one_line
        from noah_zoo.training.settings import configure
        from noah_zoo.training.trainer import train

        use_device(args)
        is_main = get_int_from_env(['RANK', 'PMI_RANK', 'OMPI_COMM_WORLD_RANK', 'MV2_COMM_WORLD_RANK'], 0) == 0
        logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format='%(message)s')
        for name in 'accelerate', 'timm':  # every file of a checkpoint, the missing keys of a new head
            logging.getLogger(name).setLevel(logging.WARNING)
        if getattr(args, 'check_data', False):
            del args.check_data
            config = configure(**{'model': '', 'output': '', **vars(args), 'recipe': 'none'})
            task = find_task(config.task)
            print(check_data(config, task.reads, task.check_images))
            return
        try:
            summary = train(configure(**vars(args)))
        except DamagedImageError as error:
            raise ValueError(
                f'{one_line(error)}; --check-data finds all such images, --skip-damaged leaves them out') from error
        if is_main:
            task = find_task(summary['config'].get('task', 'multiclass'))  # runs from before there were tasks
            value = summary[task.metric]  # None if it was no number
            figure = f'{task.figures[task.metric]} {"undefined" if value is None else f"{value:.2f}"}'
            print(f'{args.model}: val {figure} after {summary["epoch"]} epochs, {summary["seconds"]:.0f} s')

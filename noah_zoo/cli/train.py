"""Train a model on one or many devices.

    accelerate launch scripts/train.py --model resnet18_noah --dataset folder --data-dir /data/imagenet \\
        --output runs/resnet18_noah
    accelerate launch scripts/train.py --model deit_tiny_patch16_224_noah --dataset folder --data-dir /data/imagenet \\
        --output runs/short --epochs 100 --batch-size 512 --device-batch-size 64 --mixup 0 --model-ema-decay none

The recipe is chosen by the model: the paper's for its 25 models and their vanilla twins, else plain defaults. A flag
comes before the recipe; 'none' and --no-... switch off. `python scripts/train.py ...` does the same on one device.
"""
import argparse
import ast
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, get_args

SHORT = {'batch_size': ['-b'], 'workers': ['-j']}
MORE = {
    'data_dir': dict(type=str),  # 'none' is a folder's name
    'smoke': dict(nargs='?', const=3),
    'no_aug': dict(action='store_true'),  # Python 3.14 has no pairs --no-aug and --no-no-aug
    'cache_features': dict(nargs='?', const='~/.cache/noah_zoo/features', metavar='DIR')}
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
                pairs[key] = text
        setattr(namespace, self.dest, pairs)


def or_none(kind: Callable) -> Callable:
    def convert(text: str) -> Any:
        return None if text.lower() == 'none' else kind(text)
    convert.__name__ = f"{kind.__name__} or 'none'"  # for argparse's message
    return convert


def argument_of(kind: Any) -> Dict[str, Any]:
    """The arguments of `add_argument` for a field of this type."""
    if kind in (bool, Optional[bool]):
        return dict(action=argparse.BooleanOptionalAction)
    if kind in METAVARS:
        return dict(type=kind, metavar=METAVARS[kind])
    if kind == Dict[str, Any]:
        return dict(nargs='*', action=KeyValue, metavar='KEY=VALUE')
    if type(None) in get_args(kind):
        return dict(type=or_none(get_args(kind)[0]), metavar=METAVARS[get_args(kind)[0]])
    return dict(type=get_args(kind)[0], nargs=len(get_args(kind)), metavar=METAVARS[get_args(kind)[0]])  # a tuple


def parse_args(
        argv: Optional[List[str]] = None, prog: str = 'train.py', description: Optional[str] = None,
) -> Tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The namespace has what was given, and nothing else: the recipe decides the rest."""
    from noah_zoo.config import TrainConfig
    from noah_zoo.recipes import RECIPES, Recipe

    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=prog, usage=f'{prog} --model NAME --output DIR [--recipe NAME] [flags]; see --help',
        description=description or __doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    run = parser.add_argument_group('run')
    hyper = parser.add_argument_group('hyper-parameters', "the recipe's, unless given")
    hyper.add_argument(
        '--recipe', metavar='NAME', choices=['auto', 'none', *RECIPES],
        help=f"'auto' is that of the model, 'none' the plain defaults, else {', '.join(RECIPES)}")
    of_recipe = {field.name for field in dataclasses.fields(Recipe)}
    for field in dataclasses.fields(TrainConfig):
        group, text = hyper if field.name in of_recipe else run, field.metadata['help']
        missing = field.default is field.default_factory
        required = missing and '--check-data' not in argv
        if group is run and not (missing or field.default in (None, False)):
            text += f' ({field.default})'
        group.add_argument(
            *SHORT.get(field.name, []), '--' + field.name.replace('_', '-'), required=required,
            help=text.replace('%', '%%'), **{**argument_of(field.type), **MORE.get(field.name, {})})
    run.add_argument(
        '--check-data', action='store_true',
        help='only read annotations and every image once, and say what is wrong; needs neither --model nor --output')
    return parser, parser.parse_args(argv)


def main(prog: str = 'train.py', description: Optional[str] = None, **defaults: Any) -> None:
    """Train, with `defaults` for what is not given."""
    parser, args = parse_args(prog=prog, description=description)
    args = argparse.Namespace(**{**defaults, **vars(args)})
    from noah_zoo.cli import plain_errors

    def kept() -> str:
        begun = hasattr(args, 'output') and Path(args.output).is_dir()
        return f'; with --resume auto it goes on from the newest checkpoint in {args.output}' if begun else ''

    with plain_errors(parser, RuntimeError, FloatingPointError, kept=kept):
        from accelerate.utils import get_int_from_env

        from noah_zoo.data.factory import check_data
        from noah_zoo.data.images import DamagedImageError
        from noah_zoo.tasks import find_task
        from noah_zoo.text import one_line
        from noah_zoo.training.settings import configure
        from noah_zoo.training.trainer import train

        is_main = get_int_from_env(['RANK', 'PMI_RANK', 'OMPI_COMM_WORLD_RANK', 'MV2_COMM_WORLD_RANK'], 0) == 0
        logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format='%(message)s')
        logging.getLogger('accelerate').setLevel(logging.WARNING)  # it tells of every file of a checkpoint
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
            print(f'{args.model}: test {figure} after {summary["epoch"]} epochs, {summary["seconds"]:.0f} s')


if __name__ == '__main__':
    main()

"""The command `noah-zoo`: a module per command, which parses its arguments and calls the package."""
import argparse
import importlib
import re
import sys
from typing import Optional

from noah_zoo import __version__
from noah_zoo.text import near

COMMANDS = (
    'train', 'finetune', 'validate', 'predict', 'visualize', 'demo', 'export', 'convert', 'publish', 'reid',
    'benchmark', 'report', 'env')


def as_command(text: str) -> str:
    """A text that names scripts of a checkout, with what they are for who has installed the package."""
    text = re.sub(r'accelerate launch scripts/(\w+)\.py', r'accelerate launch -m noah_zoo \1', text)
    return re.sub(r'\b(?:python )?(?:scripts/)?(\w+)\.py\b', r'noah-zoo \1', text)


def main() -> Optional[int]:
    """Run the command that is the first argument.

    Returns:
        Its exit status; None is 0.
    """
    modules = {name: importlib.import_module(f'noah_zoo.cli.{name}') for name in COMMANDS}
    lines = (f'  {name:<10} {module.__doc__.splitlines()[0].rstrip(".;")}' for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog='noah-zoo', usage='noah-zoo COMMAND ...; noah-zoo COMMAND --help says what it takes',
        description='\n'.join(['Commands:', *lines]), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--version', action='version', version=f'noah-zoo {__version__}')
    parser.add_argument('command', nargs='?', help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    if command is None:
        parser.print_help()
        return 0
    if command not in COMMANDS:
        close = near(command, COMMANDS)
        wanted = f'did you mean {close}?' if close else f'choose from {", ".join(COMMANDS)}'
        parser.exit(2, f'noah-zoo: error: unknown command {command!r}; {wanted}\n')
    module = modules[command]
    module.__doc__ = as_command(module.__doc__)
    del sys.argv[1]
    return module.main(f'noah-zoo {command}')

"""The command `noah-zoo`: a module per command, which parses its arguments and calls the package."""
import argparse
import importlib
import os
import re
import sys
import traceback
from contextlib import contextmanager
from typing import Callable, Iterator, Optional, Type

from noah_zoo import __version__
from noah_zoo.text import near, one_line

COMMANDS = (
    'train', 'finetune', 'validate', 'predict', 'visualize', 'demo', 'export', 'convert', 'publish', 'reid',
    'benchmark', 'report', 'env')


def as_command(text: str) -> str:
    """A text that names scripts of a checkout, with what they are for who has installed the package."""
    text = re.sub(r'accelerate launch scripts/(\w+)\.py', r'accelerate launch -m noah_zoo \1', text)
    return re.sub(r'\b(?:python )?(?:scripts/)?(\w+)\.py\b', r'noah-zoo \1', text)


@contextmanager
def plain_errors(
        parser: argparse.ArgumentParser, *errors: Type[Exception], kept: Callable[[], str] = str) -> Iterator[None]:
    """End a command by a line on standard error where a traceback would tell its user nothing.

    The exit status is 2 for wrong input, 130 after Ctrl-C, and 1, without a word, where nobody reads standard output
    any more (`| head`).

    Args:
        parser: The command's parser, which knows its name.
        errors: What wrong input raises beyond OSError, ValueError and, for want of a package, ImportError.
        kept: Makes the text that follows "interrupted": what is written and what to do.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself has left to write
        parser.exit(1)
    except (ImportError, OSError, ValueError, *errors) as error:
        _let_go(error)
        parser.exit(2, f'{parser.prog}: error: {one_line(error)}\n')
    except KeyError as error:  # timm's, of a folder or repository that is one of transformers, say
        if error.args != ('architecture',):
            raise
        parser.exit(2, f"{parser.prog}: error: the config.json of the model has no 'architecture', as timm's have\n")
    except KeyboardInterrupt as interrupt:
        _let_go(interrupt)
        parser.exit(130, f'\n{parser.prog}: interrupted{kept()}\n')


def _let_go(error: Optional[BaseException]) -> None:
    """Forget what the frames hold that an error went through, so that workers end while there is one to take what they
    send: later they wait for ever."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


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

"""The command `noah-zoo`: one module per command, with `parse_args(argv, prog)` and `run(parser, args)`.

No module of this package imports PyTorch before `run`.
"""
import argparse
import errno
import importlib
import os
import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

from ..text import near, one_line
from ..version import __version__

COMMANDS: Dict[str, str] = {  # name: the first line of its module
    'train': 'Train a model on one or many devices',
    'finetune': 'Fine-tune a pretrained model on your own images',
    'validate': 'Evaluate a pretrained model on a dataset',
    'predict': 'Classify images',
    'visualize': 'Draw where a NOAH model looked (Figure 2 of the paper)',
    'demo': 'Serve a web page that classifies an image and shows where a NOAH model looked',
    'export': 'Export a model to ONNX, torch.export or TorchScript',
    'convert': "Convert a checkpoint of the authors' release into a folder that timm loads",
    'publish': 'Publish models on the Hugging Face Hub',
    'reid': 'Train and evaluate person re-identification on Market-1501',
    'benchmark': 'Measure speed, memory and accuracy of heads and models',
    'report': 'Compare finished runs over their seeds',
    'env': 'Print versions, devices and kernels for a bug report',
}


def path(text: str) -> str:
    """A path argument; ~ is the home folder, which shells do not expand in --flag=~/folder."""
    return os.path.expanduser(text)


def file_path(text: str) -> Path:
    """`path` as a `Path`."""
    return Path(path(text))


def model_name(text: str) -> str:
    """A model argument: 'local-dir:~/folder' has a path inside."""
    prefix, colon, place = text.rpartition(':')
    return f'{prefix}{colon}{path(place)}'


def use_device(args: argparse.Namespace) -> None:
    """Have Accelerate use the torch device of --device, which is taken out of the arguments; 'cpu' sets --cpu.

    Raises:
        ValueError: If this machine has no such device.
    """
    device = vars(args).pop('device', None)
    if device is None:
        return
    from noah_zoo.inference.predict import check_device

    check_device(device)
    if device == 'cpu':
        args.cpu = True
    else:
        os.environ['ACCELERATE_TORCH_DEVICE'] = device


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests a flag for one that is unknown. Flags cannot be abbreviated.

    Attributes:
        words: The arguments that were parsed last.
    """

    def __init__(self, **kwargs):
        super().__init__(**{
            'formatter_class': argparse.RawDescriptionHelpFormatter, 'allow_abbrev': False, **kwargs})
        self.words: List[str] = []

    def parse_known_args(self, args: Optional[Sequence[str]] = None, namespace=None):
        self.words = list(sys.argv[1:] if args is None else args)
        end = self.words.index('--') if '--' in self.words else None
        for word in self.words[:end]:
            flag = word.partition('=')[0]
            if flag.startswith('--') and not any(flag in action.option_strings for action in self._actions):
                self.error(f'unknown flag {flag}; {self._suggestion(flag)}')
        return super().parse_known_args(self.words, namespace)

    def _suggestion(self, flag: str) -> str:
        """The flags with a similar name, or the first one whose help begins with the words of an unknown flag."""
        options = [action for action in self._actions if action.option_strings]
        words = re.sub('[-_]+', ' ', flag).strip()
        described = [
            action.option_strings[-1] for action in options
            if ' ' in words and re.match(rf'(\w+ )?{words}\b', action.help or '', re.IGNORECASE)]
        similar = near(flag, [option for action in options for option in action.option_strings], cutoff=0.7)
        found = described[0] if described else similar
        return f'did you mean {found}?' if found else f'{self.prog} --help lists all flags'


@contextmanager
def readable_errors(
        parser: argparse.ArgumentParser, *errors: Type[Exception], kept: Callable[[], str] = str) -> Iterator[None]:
    """End a command with one line on standard error where a traceback would tell its user nothing.

    The exit status is 2 for wrong input, 130 after Ctrl-C, and 1, without a message, if standard output was closed
    (`| head`).

    Args:
        parser: The command's parser, which knows its name.
        errors: What wrong input raises beyond OSError, ValueError and, for a missing package, ImportError.
        kept: Makes the text that follows "interrupted": what was written and what to do next.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes standard output as it exits
        parser.exit(1)
    except (ImportError, OSError, ValueError, *errors) as error:
        _clear_frames(error)
        parser.exit(2, f'{parser.prog}: error: {one_line(error)}{_hint(error)}\n')
    except KeyError as error:  # timm's, if the config.json is not timm's but, say, one of transformers
        if error.args != ('architecture',):
            raise
        parser.exit(2, f"{parser.prog}: error: the config.json of the model has no 'architecture', as timm's have\n")
    except KeyboardInterrupt as interrupt:
        _clear_frames(interrupt)
        parser.exit(130, f'\n{parser.prog}: interrupted{kept()}\n')


def _hint(error: BaseException) -> str:
    """What to do about limits of the system that loading processes meet."""
    if re.search(r'shared memory|\bshm\b|Bus error', str(error)):
        return '; give --workers 0, or more shared memory to the container (docker run --shm-size 2g)'
    if getattr(error, 'errno', None) == errno.EMFILE or 'Too many open files' in str(error):
        return '; give fewer --workers, or raise the limit with ulimit -n'
    return ''


def _clear_frames(error: Optional[BaseException]) -> None:
    """Release the DataLoaders that the frames of an error hold, so that their workers end while this process still
    reads their queues; at interpreter exit they would wait forever."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def parse_args(argv: Optional[List[str]] = None) -> Tuple[ModuleType, argparse.ArgumentParser, argparse.Namespace]:
    """Return the module of a command, its parser and its arguments. PyTorch is not imported.

    Args:
        argv: The command's name and its arguments; those of the process if None.

    Raises:
        SystemExit: After --help and --version, and with status 2 if the command or an argument is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog='noah-zoo', usage='noah-zoo COMMAND ...', epilog='noah-zoo COMMAND --help lists the flags of a command.',
        description='\n'.join(['Commands:', *(f'  {name:<10} {text}' for name, text in COMMANDS.items())]))
    parser.add_argument('--version', action='version', version=f'noah-zoo {__version__}')
    parser.add_argument('command', nargs='?', help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.print_help()
        parser.exit(0)
    if name not in COMMANDS:
        close = near(name, COMMANDS)
        hint = f'did you mean {close}?' if close else f'choose from {", ".join(COMMANDS)}'
        parser.exit(2, f'noah-zoo: error: unknown command {name!r}; {hint}\n')
    command = importlib.import_module(f'.{name}', __name__)
    return command, *command.parse_args(argv[1:], f'noah-zoo {name}')


def main(argv: Optional[List[str]] = None, load: Callable[[], Any] = lambda: None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The command's name and its arguments; those of the process if None.
        load: Called after the arguments are parsed.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):  # a file name that the encoding lacks, as on Windows, is no error
            stream.reconfigure(errors='backslashreplace')
    command, parser, args = parse_args(argv)
    with readable_errors(parser):
        load()
    return command.run(parser, args) or 0

"""Start `noah-zoo` and the scripts: arguments are parsed before PyTorch is imported."""
import importlib.util
import sys
from typing import List, Optional


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command and return its exit status.

    `noah_zoo/__init__.py` registers the models, which takes PyTorch and timm. It is executed only after the arguments
    have been parsed by `noah_zoo.cli`, a package that imports neither.

    Args:
        argv: The command's name and its arguments; those of the process if None.
    """
    spec = importlib.util.find_spec('noah_zoo')
    package = None
    if 'noah_zoo' not in sys.modules:
        package = sys.modules['noah_zoo'] = importlib.util.module_from_spec(spec)
    from noah_zoo.cli import main as run

    return run(argv, load=lambda: package and spec.loader.exec_module(package))

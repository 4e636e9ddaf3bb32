"""`python -m noah_zoo` is the command `noah-zoo`."""
import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())

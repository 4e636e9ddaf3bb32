"""`noah-zoo reid` from a checkout."""
import sys

from noah_zoo_cli import main

if __name__ == '__main__':
    sys.exit(main(['reid', *sys.argv[1:]]))

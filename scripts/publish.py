"""`noah-zoo publish` from a checkout."""
import sys

from noah_zoo_cli import main

if __name__ == '__main__':
    sys.exit(main(['publish', *sys.argv[1:]]))

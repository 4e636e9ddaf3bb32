"""First weights of the head, compared in training from scratch: `noah-zoo train` with those of a candidate.

    python results/first_weights/scratch.py scores_0 --model resnet18_noah --output runs/x ...

Candidates are those of frozen.py, what follows are the flags of `noah-zoo train`.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from frozen import start  # noqa: E402

from noah_zoo import NoahHead  # noqa: E402
from noah_zoo.cli import main  # noqa: E402

if __name__ == '__main__':
    candidate = sys.argv.pop(1)
    NoahHead.reset_parameters = lambda head: start(head, candidate)
    main(['train', *sys.argv[1:]])

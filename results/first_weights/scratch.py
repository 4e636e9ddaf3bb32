"""First weights of the head, compared in training from scratch: scripts/train.py with those of a candidate.

    python results/first_weights/scratch.py scores_0 --model resnet18_noah --output runs/x ...

Candidates are those of frozen.py, what follows are the flags of scripts/train.py.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / 'scripts')]

from frozen import start  # noqa: E402
from train import main  # noqa: E402

from noah_zoo import NoahHead  # noqa: E402

if __name__ == '__main__':
    candidate = sys.argv.pop(1)
    NoahHead.reset_parameters = lambda head: start(head, candidate)
    main()

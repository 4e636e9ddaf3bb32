"""`noah-zoo visualize` of this checkout. Run by its path, its --help does not wait for PyTorch."""
from pathlib import Path
from runpy import run_path

if __name__ == '__main__':
    run_path(str(Path(__file__).resolve().parents[1] / 'noah_zoo' / 'cli' / Path(__file__).name), run_name='__main__')

"""How the tests are shared among processors."""
import os


def pytest_xdist_auto_num_workers(config):
    """One process per processor for the whole of the tests, this one alone for a choice of them."""
    chosen = config.args_source is config.ArgsSource.ARGS or config.option.keyword
    if not chosen:
        os.environ.setdefault('OMP_NUM_THREADS', '1')  # of PyTorch in each
    return 0 if chosen else min(os.cpu_count() or 1, 8)

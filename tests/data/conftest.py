"""What all tests of datasets share."""
import pytest


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    # datasets sleeps 5 s at the end of a shuffled parquet stream
    monkeypatch.setattr('datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN', 0.1, raising=False)

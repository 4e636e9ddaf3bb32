"""What all tests of runs share."""
import pytest

from noah_zoo.training import trainer
from noah_zoo.training.curve import draw_curve


@pytest.fixture(autouse=True, scope='module')
def no_curves():
    """Leave out the picture of the curve, which takes a third of the time of a run of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, 'draw_curve', lambda *args: None)
        yield


@pytest.fixture
def curves(monkeypatch):
    """For tests that look at the picture."""
    monkeypatch.setattr(trainer, 'draw_curve', draw_curve)

"""What all tests of tasks share."""
from ..training.conftest import curves, no_curves  # noqa: F401

"""timm's own tests/test_models.py on every model of this project. Name a checkout of timm in TIMM_REPO."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason='TIMM_REPO does not name a checkout of pytorch-image-models')
def test_timm_suite():
    tests = Path(os.environ['TIMM_REPO']) / 'tests' / 'test_models.py'
    path = os.pathsep.join((str(ROOT), str(ROOT / 'tests')))
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'timm_suite', '-k', 'test_model and not regnetx_002', str(tests)],
        cwd=tests.parent, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]

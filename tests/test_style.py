"""The code is as ruff wants it (pyproject.toml says what that is)."""

import subprocess
import sys

from tests.conftest import ROOT


def test_ruff_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

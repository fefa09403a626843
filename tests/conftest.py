"""Shared by all tests: the repository's root is importable, and torch does not take both cores twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# in the background of a shell script Ctrl+C is ignored, and programs that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.models.differences import pytest_terminal_summary  # noqa: E402, F401


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 12 MB, which a test may make read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a mapped file may still be open

"""Shared by all tests: the repository's root is importable, and torch does not take both cores twice."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# in the background of a shell script Ctrl+C is ignored, and programs that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.models.differences import pytest_terminal_summary  # noqa: E402, F401

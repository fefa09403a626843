"""Where the reference results of the official implementations lie, if they are there."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORACLE = Path(os.environ.get("ORACLE_DIR", ROOT.parent / "shared" / "oracle"))


def oracle_file(*parts: str) -> Path:
    """A file of the reference data; skips the test where it is not there."""
    path = ORACLE.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no reference data at {path} (set ORACLE_DIR)")
    return path

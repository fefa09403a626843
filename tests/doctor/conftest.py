"""Pythons and programs that lack something."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with nothing but the standard library."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@pytest.fixture
def packages(bare):
    """Where packages of the bare Python go; emptied afterwards."""
    (folder,) = bare.parent.parent.glob("[Ll]ib/**/site-packages")
    yield folder
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def copy(tmp_path):
    """The program in a folder of its own."""
    for name in ("server", "system", "THUDM/demo"):
        ignored = shutil.ignore_patterns("__pycache__", "python", "wheels", "build")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    return tmp_path

"""``python -m server`` as a process: what it says and how it ends when it does not come to serving."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def start(*argv: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CHATGLM_", "PYTHON"))}
    return subprocess.run([sys.executable, "-m", "server", *argv], capture_output=True, encoding="utf-8", cwd=root,
                          env={**kept, "CHATGLM_LANG": "en", "PYTHONUTF8": "1", **env}, timeout=120)  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    """The program in a folder of its own, where a config.toml disturbs nobody."""
    shutil.copytree(ROOT / "server", tmp_path / "server", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "THUDM" / "demo", tmp_path / "THUDM" / "demo")
    return tmp_path


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_one_sentence_for_a_bad_variable():
    assert "CHATGLM_PORT in the environment cannot be 'zz'" in one_sentence(start(CHATGLM_PORT="zz"))


def test_one_sentence_for_a_bad_file(copy):
    (copy / "config.toml").write_text("port = ")
    assert "not valid TOML" in one_sentence(start(root=copy))


def test_one_sentence_for_a_port_in_use(copy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = one_sentence(start(root=copy, CHATGLM_MODEL="demo", CHATGLM_PORT=str(port)))
    assert f"port {port}" in said


@pytest.mark.skipif(os.name == "nt", reason="there a pipe without a reader is another error")
def test_reader_that_leaves():
    environment = {**os.environ, "CHATGLM_LANG": "en"}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", "server", "--help"], stdout=writer, stderr=subprocess.PIPE,
                              cwd=ROOT, env=environment, timeout=120)  # fmt: skip
    finally:
        os.close(writer)
    assert done.stderr == b""


def test_console_that_lacks_chinese():
    done = start("--help", CHATGLM_LANG="zh", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == "" and "--port" in done.stdout
    wrong = start("--port", "x", CHATGLM_LANG="zh", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert wrong.returncode == 2 and "--port" in wrong.stderr and "Traceback" not in wrong.stderr

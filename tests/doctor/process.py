"""The doctor as a process."""

import json
import os
import subprocess

import pytest

from tests.conftest import ROOT

posix = pytest.mark.skipif(os.name == "nt", reason="a venv here is a link, and signals are POSIX'")
IDS = ["system", "python", "packages", "folder", "settings", "vcruntime", "gpu", "torch", "memory", "disk", "model",
       "profile", "needs", "kernels", "port", "proxy", "lan"]  # fmt: skip


def call(python, *argv, root=ROOT, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CHATGLM_", "PYTHON"))}
    return subprocess.run([python, "-m", "server", "doctor", *argv], capture_output=True, encoding="utf-8", cwd=root,
                          env={**kept, "CHATGLM_LANG": "en", "PYTHONUTF8": "1", **env}, timeout=200)  # fmt: skip


def results(done):
    assert done.stderr == "", done.stderr
    return {check["id"]: check for check in json.loads(done.stdout)["checks"]}

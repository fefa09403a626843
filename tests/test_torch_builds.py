import os
import shlex
import sys

import pytest

from system import torch_builds
from tests.conftest import ROOT


def attempts(gpu, system="linux"):
    return [(a.requirement, *a.options[1:]) for a in torch_builds.torch_attempts("2.13.0", gpu, system)]


CPU = "https://download.pytorch.org/whl/cpu"
CU126, CU130 = CPU[:-3] + "cu126", CPU[:-3] + "cu130"


@pytest.mark.parametrize(
    ("gpu", "system", "expected"),
    [
        (None, "linux", [("torch==2.13.0+cpu",), ("torch==2.13.0+cpu", CPU), ("torch==2.13.0",)]),
        (None, "win32", [("torch==2.13.0",)]),
        (None, "darwin", [("torch==2.13.0",)]),
        ((580, (8, 6)), "linux", [("torch==2.13.0+cu130", CU130), ("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((580, (8, 6)), "win32", [("torch==2.13.0+cu130", CU130), ("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((580, (6, 1)), "win32", [("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((551, (8, 9)), "linux", [("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((470, (3, 5)), "linux", [("torch==2.13.0+cpu",), ("torch==2.13.0+cpu", CPU), ("torch==2.13.0",)]),
    ],
)  # fmt: skip
def test_build_of_pytorch_for_this_machine(gpu, system, expected):
    assert attempts(gpu and torch_builds.Gpu(*gpu), system) == expected


def test_pin_is_read_from_the_file():
    assert torch_builds.torch_pin(ROOT / "requirements.txt") == "2.13.0"


@pytest.mark.skipif(os.name == "nt", reason="a script is not a program on Windows")
@pytest.mark.parametrize(
    ("output", "gpu"),
    [
        ("580.65.06, 8.6\n", (580, (8, 6))),
        ("551.23, 6.1\n551.23, 8.9\n", (551, (8, 9))),
        ("NVIDIA-SMI has failed\n", None),
        ("", None),
    ],
)
def test_gpu_is_asked_of_nvidia_smi(output, gpu, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    code = f"print({output!r}, end='')"
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n")  # spaces in paths
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert torch_builds.find_gpu() == gpu


@pytest.mark.parametrize(
    ("gpu", "zh", "en"),
    [
        (None, "没有找到 NVIDIA 显卡和驱动", "No NVIDIA GPU with a driver"),
        ((580, (3, 5)), "显卡太旧（计算能力 3.5，PyTorch 要 5.0 起）", "compute capability 3.5, PyTorch needs 5.0"),
        ((470, (8, 6)), "驱动 470 太旧（PyTorch 要 525", "driver 470 is too old (PyTorch for the GPU needs 525"),
    ],
)
def test_why_there_is_no_build_for_cuda(gpu, zh, en):
    assert all("+cu" not in requirement for requirement, *_ in attempts(gpu and torch_builds.Gpu(*gpu), "win32"))
    said = torch_builds.why_no_cuda(gpu and torch_builds.Gpu(*gpu), "setup_offline.bat")
    assert zh in said[0] and en in said[1]

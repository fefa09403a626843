"""Which build of PyTorch this machine needs: for CUDA, by its driver and GPU, or for the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# a mirror of it may be nearer; cu126 and so on are appended
PYTORCH_INDEX = os.environ.get("PYTORCH_INDEX_URL", "https://download.pytorch.org/whl").rstrip("/") + "/"
# PyTorch's builds for CUDA, best first: oldest driver, oldest GPU (compute capability)
CUDA_BUILDS = {"cu130": (580, (7, 5)), "cu126": (525, (5, 0))}


class Gpu(NamedTuple):
    driver: int  # major version
    capability: tuple[int, int]


class Attempt(NamedTuple):
    """A way to get PyTorch."""

    requirement: str
    options: tuple[str, ...]
    zh: str
    en: str


def torch_pin(requirements: Path) -> str | None:
    """The version of PyTorch that the file asks for."""
    match = re.search(r"^torch==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def find_gpu() -> Gpu | None:
    """The newest NVIDIA GPU and its driver, asked of nvidia-smi; None where there is none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [program, "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.findall(r"^(\d+)\.[\d.]+, *(\d+)\.(\d+)", done.stdout, re.MULTILINE)
    return max((Gpu(int(driver), (int(a), int(b))) for driver, a, b in found), default=None)


def why_no_cuda(gpu: Gpu | None, again: str) -> tuple[str, str]:
    """What to tell the user of a machine for which there is no build for CUDA; ``again``: the program to run later."""
    driver, (major, minor) = min(CUDA_BUILDS.values())
    if gpu is None:
        return (f"没有找到 NVIDIA 显卡和驱动（nvidia-smi）：用 CPU 版 PyTorch。装好驱动后运行 {again}，就换成显卡版。",
                "No NVIDIA GPU with a driver (nvidia-smi) was found: PyTorch for the CPU is used. When the driver is "
                f"installed, run {again} to change to the one for the GPU.")
    if gpu.capability < (major, minor):
        found = ".".join(map(str, gpu.capability))
        return (f"这块显卡太旧（计算能力 {found}，PyTorch 要 {major}.{minor} 起）：用 CPU 版 PyTorch。",
                f"This GPU is too old (compute capability {found}, PyTorch needs {major}.{minor}): PyTorch for the "
                "CPU is used.")
    return (f"显卡驱动 {gpu.driver} 太旧（PyTorch 要 {driver} 或更新的）：用 CPU 版。更新后运行 {again} 换成显卡版。",
            f"The GPU's driver {gpu.driver} is too old (PyTorch for the GPU needs {driver} or newer): PyTorch for the "
            f"CPU is used. When the driver is updated, run {again} to change to the one for the GPU.")


def torch_attempts(pin: str, gpu: Gpu | None, system: str) -> list[Attempt]:
    """Ways to get PyTorch ``pin`` for this machine (``system`` as in sys.platform), the best first."""
    attempts = []
    for build, (driver, capability) in CUDA_BUILDS.items():
        if gpu and gpu.driver >= driver and gpu.capability >= capability:
            attempts.append(Attempt(f"torch=={pin}+{build}", ("--extra-index-url", PYTORCH_INDEX + build),
                                    f"正在安装 PyTorch（显卡版 {build}，约 2 GB）……",
                                    f"Installing PyTorch ({build} for the GPU, about 2 GB) ..."))
    if system == "linux" and not attempts:
        cpu = f"torch=={pin}+cpu"
        zh, en = "正在安装 PyTorch（CPU 版，约 200 MB）……", "Installing PyTorch (for the CPU, about 200 MB) ..."
        attempts.append(Attempt(cpu, (), zh, en))
        attempts.append(Attempt(cpu, ("--extra-index-url", PYTORCH_INDEX + "cpu"),
                                "换 PyTorch 官方源再试……", "Trying PyTorch's own index ..."))
    # on Linux the package index has the build for CUDA, elsewhere the one for the CPU
    size = ("，约 2 GB", ", about 2 GB") if system == "linux" else ("", "")
    attempts.append(Attempt(f"torch=={pin}", (), f"正在安装 PyTorch（软件源的默认版{size[0]}）……",
                            f"Installing PyTorch (the package index's default{size[1]}) ..."))
    return attempts

"""Installs requirements.txt, once: into system/python where the bundle has one, else into .venv.

    python system/install.py [--with-tests]

Nothing is done while what was installed is up to date, and an installation that was cut short is repaired. Uses only
the standard library and whatever Python >= 3.10 it is started with; pip's own settings (PIP_INDEX_URL ...) hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.i18n import system_language  # noqa: E402

OLDEST, NEWEST = (3, 10), (3, 14)  # Pythons that the pinned PyTorch has wheels for
PYTORCH_INDEX = "https://download.pytorch.org/whl/"
# PyTorch's builds for CUDA, best first: oldest driver, oldest GPU (compute capability)
CUDA_BUILDS = {"cu130": (580, (7, 5)), "cu126": (525, (5, 0))}
NOT_FOUND = ("No matching distribution found", "Could not find a version that satisfies")


class Failure(Exception):
    """The installation cannot go on: a sentence in both languages."""

    def __init__(self, zh: str, en: str):
        super().__init__(en)
        self.zh, self.en = zh, en


class Gpu(NamedTuple):
    driver: int  # major version
    capability: tuple[int, int]


class Attempt(NamedTuple):
    """A way to get PyTorch."""

    requirement: str
    options: tuple[str, ...]
    zh: str
    en: str


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    zh = system_language() == "zh"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # consoles that lack Chinese
    files = [ROOT / "requirements.txt"] + [ROOT / "tests" / "requirements.txt"] * ("--with-tests" in argv)
    try:
        install(ROOT, files, zh)
    except Failure as failure:
        print(failure.zh if zh else failure.en, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n安装中断了，下次启动会接着装。" if zh else "\nInterrupted; the next start goes on.", file=sys.stderr)
        return 130
    return 0


def install(root: Path, files: Sequence[Path], zh: bool) -> None:
    """Bring the environment of ``root`` to what the requirement ``files`` say."""
    bundled = root / "system" / "python"
    in_bundle = bundled in Path(sys.executable).parents
    home = bundled if in_bundle else root / ".venv"
    stamp = Stamp(home, root)
    if stamp.is_current(files):
        return
    _check_python()
    environment = Environment(Path(sys.executable) if in_bundle else venv_python(home), root, zh)
    if not in_bundle and (stamp.was_cut_short() or not environment.has_pip()):
        environment.say("正在建立 .venv ……", "Making .venv ...")
        make_venv(home)
    if not environment.has_pip():
        raise Failure(f"{environment.python} 没有 pip：请重新解压整个程序包。",
                      f"{environment.python} has no pip: unpack the whole bundle again.")
    with stamp.running(files):
        environment.install(files)


class Stamp:
    """Notes in the environment: what was installed (hashes of the requirement files), and that a run is under way."""

    def __init__(self, home: Path, root: Path):
        self._root = root
        self._done, self._running = home / "installed.json", home / "installing"

    def is_current(self, files: Sequence[Path]) -> bool:
        try:
            noted = json.loads(self._done.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return not self.was_cut_short() and self._hashes(files).items() <= noted.items()

    def was_cut_short(self) -> bool:
        return self._running.exists()

    @contextlib.contextmanager
    def running(self, files: Sequence[Path]) -> Iterator[None]:
        """The note of a run stays if it is killed; where pip itself gave up, everything is still in order."""
        self._running.touch()
        try:
            yield
            self._done.write_text(json.dumps(self._hashes(files)), encoding="utf-8")
            self._running.unlink()
        except Failure:
            self._running.unlink()
            raise

    def _hashes(self, files: Sequence[Path]) -> dict[str, str]:
        names = (path.relative_to(self._root).as_posix() for path in files)
        return {name: hashlib.sha256((self._root / name).read_bytes()).hexdigest() for name in names}


class Environment:
    """A Python into which packages go."""

    def __init__(self, python: Path, root: Path, zh: bool):
        self.python, self._zh = python, zh
        wheels = root / "system" / "wheels"
        self._wheels = ["--find-links", str(wheels)] if wheels.is_dir() else []
        self._output = ""

    def say(self, zh: str, en: str) -> None:
        print(zh if self._zh else en, flush=True)

    def has_pip(self) -> bool:
        try:
            done = subprocess.run([self.python, "-I", "-m", "pip", "--version"], capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def install(self, files: Sequence[Path]) -> None:
        """From system/wheels alone if it has everything, else with what the package index has."""
        listed = [word for path in files for word in ("-r", str(path))]
        if self._wheels:
            self.say("正在从 system/wheels 安装……", "Installing from system/wheels ...")
            if self._pip("--no-index", *self._wheels, *listed):
                return
        pin = torch_pin(files[0])
        if pin and not self._has_torch(pin):
            self._install_torch(pin)
        self.say("正在安装其余的包……", "Installing the other packages ...")
        if not self._pip(*self._wheels, *listed):
            self._give_up()

    def _install_torch(self, pin: str) -> None:
        for attempt in torch_attempts(pin, find_gpu(), sys.platform):
            self.say(attempt.zh, attempt.en)
            if self._pip(*self._wheels, *attempt.options, attempt.requirement):
                return
            if not any(sign in self._output for sign in NOT_FOUND):
                break  # it was there, and something else went wrong
        self._give_up()

    def _has_torch(self, pin: str) -> bool:
        code = "import importlib.metadata as m; print(m.version('torch'))"
        done = subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True)
        return done.stdout.strip().split("+")[0] == pin

    def _pip(self, *arguments: str) -> bool:
        pip = [str(self.python), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
        env = {**os.environ, "PIP_USER": "0"}  # a --user from pip's settings is an error in a venv
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen([*pip, *arguments], stdout=output, stderr=subprocess.STDOUT, env=env)
            _show_seconds(process)
            output.seek(0)
            self._output = output.read().decode(errors="replace")
        return process.returncode == 0

    def _give_up(self) -> None:
        lines = [line for line in self._output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-15:]
        print("\n".join(errors[-15:]), file=sys.stderr)
        raise Failure("安装没有成功，原因见上面 pip 的报错（多半是网络或磁盘）：解决后再启动；PIP_INDEX_URL 可换源。",
                      "The installation failed, pip says why above, mostly the network or the disk: mend it and start "
                      "again (PIP_INDEX_URL chooses another package index).")


def _show_seconds(process: subprocess.Popen) -> None:
    started, on_screen = time.monotonic(), sys.stdout.isatty()
    try:
        while process.poll() is None:
            if on_screen:
                print(f"\r  {time.monotonic() - started:.0f} s ", end="", flush=True)
            time.sleep(0.2)
    finally:
        if process.poll() is None:  # Ctrl+C: pip has got it as well
            process.wait()
        if on_screen:
            print("\r" + " " * 12 + "\r", end="", flush=True)


def _check_python() -> None:
    version = platform.python_version()
    if not OLDEST <= sys.version_info[:2] <= NEWEST or sys.maxsize < 2**32:
        raise Failure(f"需要 64 位的 Python 3.10 到 3.14，{sys.executable} 是 {version}：请从 python.org 安装。",
                      f"This Python is {version} ({sys.executable}); needed is a 64-bit one from 3.10 to 3.14, see "
                      "python.org.")


def venv_python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(home: Path) -> None:
    """A fresh virtual environment with pip in place of whatever is in ``home``."""
    base = getattr(sys, "_base_executable", sys.executable)  # this may be the broken environment's own Python
    done = subprocess.run([base, "-I", "-m", "venv", "--clear", str(home)], capture_output=True, text=True)
    if done.returncode == 0:
        return
    print((done.stdout + done.stderr).strip(), file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    raise Failure("建立 .venv 失败：Debian、Ubuntu 上先执行 sudo apt install python3-venv；别的系统见上面的报错。",
                  "Could not make .venv: on Debian and Ubuntu run sudo apt install python3-venv first; else see above.")


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A Python into which packages go: which are there, and pip, run quietly, with its words kept for when it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from system import embedded
from system.torch_builds import Attempt, find_gpu, torch_attempts, torch_pin, why_no_cuda

NOT_FOUND = ("No matching distribution found", "Could not find a version that satisfies")
_AGAIN = "setup_offline.bat" if os.name == "nt" else "system/install.py --repair"
# a sign in what pip said, and what to do about it; the first one found counts
_REASONS = (
    (r"Errno 28|WinError 112", "磁盘满了：请腾出几 GB，再运行一次。",
     "The disk is full: make room for some GB and run this again."),
    (r"WinError (5|32)\b", "有文件正在使用，或被杀毒软件拦住：请先关掉正在运行的本程序，再运行一次。",
     "A file is in use, or a virus scanner holds it: close this program where it is running, and run this again."),
    (r"Retrying \(", "连不上软件源：请检查网络和代理，再运行一次。PIP_INDEX_URL 可换镜像；没有网络，就把包放进"
     " system/wheels。",
     "The package index cannot be reached: check the network and the proxy, and run this again. PIP_INDEX_URL chooses "
     "another index; without a network put the wheels into system/wheels."),
    ("", "安装没有成功，原因见上面 pip 的报错（多半是网络或磁盘）：解决后再启动；PIP_INDEX_URL 可换源。",
     "The installation failed, pip says why above, mostly the network or the disk: mend it and start again "
     "(PIP_INDEX_URL chooses another package index)."),
)  # fmt: skip


class Failure(Exception):
    """The installation cannot go on: a sentence in both languages."""

    def __init__(self, zh: str, en: str):
        super().__init__(en)
        self.zh, self.en = zh, en


class Environment:
    """A Python into which packages go.

    ``lock``: the file of hashes that says what a bundle's Python gets; others get what requirements.txt allows.
    """

    def __init__(self, python: Path, root: Path, zh: bool, lock: Path | None = None):
        self.python, self._zh, self._lock = python, zh, lock
        self.inherited: tuple[int, ...] = ()  # descriptors that pip inherits
        self._pin = torch_pin(root / "requirements.txt")
        wheels = root / "system" / "wheels"
        self._wheels = ["--find-links", str(wheels)] if wheels.is_dir() else []
        self._output = ""

    def say(self, zh: str, en: str) -> None:
        print(zh if self._zh else en, flush=True)

    def has_pip(self) -> bool:
        code = "import importlib.metadata as m, pip._internal.commands.install; m.version('pip')"
        command = [self.python, "-I", "-c", code]
        try:
            done = subprocess.run(command, capture_output=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def add_pip(self, wheels: Path) -> None:
        """The pip that the lock names, for a Python that has none. Raises OSError and LookupError as ``find_pip``."""
        with tempfile.TemporaryDirectory() as work:
            program, options = embedded.find_pip(self._lock, wheels, Path(work))
            version, digests = embedded.pinned(self._lock, "pip")
            wanted = Path(work) / "pip.txt"
            wanted.write_text(" ".join([f"pip=={version}", *(f"--hash=sha256:{one}" for one in sorted(digests))]))
            options = [*options, "--no-deps", "--force-reinstall", "--require-hashes", "-r", str(wanted)]
            if not self._pip(*options, program=program):
                self._give_up()

    def package_folders(self) -> set[Path]:
        """Where pip puts packages."""
        code = "import sysconfig as s; print(s.get_path('purelib'), s.get_path('platlib'), sep=chr(10))"
        command = [self.python, "-I", "-X", "utf8", "-c", code]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return {Path(line).resolve() for line in done.stdout.splitlines()}

    def install(self, files: Sequence[Path], repair: bool = False) -> None:
        """From system/wheels alone if it has everything, else with what the package index has.

        ``repair``: also change between the builds of PyTorch where another one fits this machine.
        """
        listed = [word for path in files for word in ("-r", str(path))]
        if self._wheels and not self._lock and not repair:
            self.say("正在从 system/wheels 安装……", "Installing from system/wheels ...")
            if self._pip("--no-index", *self._wheels, *listed):
                return
        if self._pin:
            self._choose_torch(self._pin, repair)
        self.say("正在安装其余的包……", "Installing the other packages ...")
        if self._wheels and self._pip("--no-index", *self._wheels, *listed):
            return
        if not self._pip(*self._wheels, *listed):
            self._give_up()

    def _choose_torch(self, pin: str, repair: bool) -> None:
        version, _, build = self._torch_version().partition("+")
        there = version == pin
        if there and not repair:
            return
        gpu = find_gpu()
        attempts = torch_attempts(pin, gpu, sys.platform)
        for_gpu = [attempt for attempt in attempts if "+cu" in attempt.requirement]
        if not for_gpu and (gpu or (self._lock and not there)):
            self.say(*why_no_cuda(gpu, _AGAIN))
        if there and (not for_gpu or f"torch=={pin}+{build}" in {attempt.requirement for attempt in for_gpu}):
            return
        # the lock has PyTorch for the CPU, with its hash
        attempts = for_gpu if self._lock or there else attempts
        if self._install_torch(attempts):
            return
        if there:
            self.say("显卡版 PyTorch 没有装上，原来的还在：程序能用，网络好时再运行一次本程序。",
                     "PyTorch for the GPU could not be installed; the one that is there stays, and the program works "
                     "with it. Run this again when the network is better.")
        elif not self._not_found():
            self._give_up()
        elif for_gpu and self._lock:
            self.say(f"显卡版 PyTorch 没有找到，先用 CPU 版。网络好时运行 {_AGAIN} 换成显卡版（PYTORCH_INDEX_URL 可换"
                     "镜像）。",
                     "PyTorch for the GPU was not found, so that for the CPU is used. When the network is better, run "
                     f"{_AGAIN} to change to it (PYTORCH_INDEX_URL chooses a mirror).")

    def _install_torch(self, attempts: Sequence[Attempt]) -> bool:
        """Whether one of the attempts went well, or there is none to make."""
        extra = ["--no-deps"] if self._lock else []  # what it needs is in the lock
        if self._wheels and any(
            self._pip("--no-index", *self._wheels, *extra, attempt.requirement) for attempt in attempts
        ):
            return True
        for attempt in attempts:
            self.say(attempt.zh, attempt.en)
            if self._pip(*self._wheels, *attempt.options, *extra, attempt.requirement):
                return True
            if not self._not_found():
                break  # it was there, and something else went wrong
        return not attempts

    def _not_found(self) -> bool:
        return any(sign in self._output for sign in NOT_FOUND)

    def _torch_version(self) -> str:
        code = "import importlib.metadata as m; print(m.version('torch'))"
        done = subprocess.run([self.python, "-I", "-c", code], capture_output=True, text=True)
        return done.stdout.strip()

    def _pip(self, *arguments: str, program: Sequence[str] = ("-m", "pip")) -> bool:
        pip = [str(self.python), "-I", "-X", "utf8", *program, "--disable-pip-version-check", "--no-input", "install"]
        env = {**os.environ, "PIP_USER": "0"}  # a --user from pip's settings is an error in a venv
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen([*pip, *arguments], stdout=output, stderr=subprocess.STDOUT, env=env,
                                       pass_fds=self.inherited)
            _show_seconds(process)
            output.seek(0)
            self._output = output.read().decode(errors="replace")
        return process.returncode == 0

    def _give_up(self) -> None:
        lines = [line for line in self._output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-15:]
        print("\n".join(errors[-15:]), file=sys.stderr)
        raise next(Failure(zh, en) for sign, zh, en in _REASONS if re.search(sign, self._output))


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

"""Installs requirements.txt, once: into system/python where the bundle has one, else into .venv.

    python system/install.py [--with-tests] [-- options of the server]

Nothing is done while what was installed is up to date, nor for options with which the server only prints something.
An installation that was cut short is gone on with. Uses only the standard library and whatever Python >= 3.10 it is
started with; pip's own settings (PIP_INDEX_URL ...) hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.file_lock import try_lock  # noqa: E402
from server.i18n import system_language  # noqa: E402
from system.repair import forget_half_installed  # noqa: E402
from system.torch_builds import find_gpu, torch_attempts, torch_pin  # noqa: E402

OLDEST, NEWEST = (3, 10), (3, 14)  # Pythons that the pinned PyTorch has wheels for
NOT_FOUND = ("No matching distribution found", "Could not find a version that satisfies")


class Failure(Exception):
    """The installation cannot go on: a sentence in both languages."""

    def __init__(self, zh: str, en: str):
        super().__init__(en)
        self.zh, self.en = zh, en


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    zh = system_language() == "zh"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # consoles that lack Chinese
    files = [ROOT / "requirements.txt"] + [ROOT / "tests" / "requirements.txt"] * ("--with-tests" in argv)
    if "--" in argv and not will_serve(argv[argv.index("--") + 1 :]):
        return 0
    try:
        install(ROOT, files, zh)
    except Failure as failure:
        print(failure.zh if zh else failure.en, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n安装中断了，下次启动会接着装（没下完的那个包重新下）。" if zh else
              "\nInterrupted; the next start goes on (a download under way begins again).", file=sys.stderr)
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
    with one_at_a_time(root / "system" / "install.lock", environment.say) as lock:
        if stamp.is_current(files):  # thanks to the one that was waited for
            return
        if not in_bundle and not environment.has_pip():
            environment.say("正在建立 .venv ……", "Making .venv ...")
            make_venv(home)
        if not environment.has_pip():
            raise Failure(f"{environment.python} 没有 pip：请重新解压整个程序包。",
                          f"{environment.python} has no pip: unpack the whole bundle again.")
        if stamp.was_cut_short():
            environment.say("上次安装没有完成，现在接着装……", "The last installation was not finished, going on ...")
            for folder in environment.package_folders():
                forget_half_installed(folder)
        environment.lock = lock
        with stamp.running(files):
            environment.install(files)


def will_serve(options: Sequence[str]) -> bool:
    """False if the server will only print a page or what is wrong, which takes no packages."""
    from server.config import parse, split_command
    from server.errors import StartupError

    if split_command(options)[0] == "doctor":
        return False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parse(options)
    except (StartupError, SystemExit):
        return False
    except ImportError:  # config.toml on Python 3.10: what reads it is yet to be installed
        return True
    return True


@contextlib.contextmanager
def one_at_a_time(path: Path, say: Callable[[str, str], None]) -> Iterator[tuple[int, ...]]:
    """Wait until nobody else installs; the system takes the lock from a process that is killed.

    Yields the descriptors that pip has to inherit: the lock then outlives a killed installer whose pip still writes.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise Failure(f"不能写入 {path.parent}（{error.strerror}）：请检查权限，或把程序移到别的文件夹。",
                      f"Cannot write to {path.parent} ({error.strerror}): check its permissions, or move the "
                      "program.") from None
    with file:
        if not try_lock(file):
            say("另一个安装正在进行，等它结束……", "Another installation is running, waiting for it to end ...")
            while not try_lock(file):
                time.sleep(0.2)
        yield () if os.name == "nt" else (file.fileno(),)


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
        """The note of a run stays unless all went well: pip may have been killed, or the disk was full."""
        self._running.touch()
        hashes = self._hashes(files)
        yield
        self._done.write_text(json.dumps(hashes), encoding="utf-8")
        self._running.unlink(missing_ok=True)

    def _hashes(self, files: Sequence[Path]) -> dict[str, str]:
        names = (path.relative_to(self._root).as_posix() for path in files)
        return {name: hashlib.sha256((self._root / name).read_bytes()).hexdigest() for name in names}


class Environment:
    """A Python into which packages go."""

    def __init__(self, python: Path, root: Path, zh: bool):
        self.python, self._zh = python, zh
        self.lock: tuple[int, ...] = ()  # descriptors that pip inherits
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

    def package_folders(self) -> set[Path]:
        """Where pip puts packages."""
        code = "import sysconfig as s; print(s.get_path('purelib'), s.get_path('platlib'), sep=chr(10))"
        command = [self.python, "-I", "-X", "utf8", "-c", code]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        return {Path(line).resolve() for line in done.stdout.splitlines()}

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
            process = subprocess.Popen([*pip, *arguments], stdout=output, stderr=subprocess.STDOUT, env=env,
                                       pass_fds=self.lock)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Installs the packages, once: into system/python where the bundle has one, else into .venv.

    python system/install.py [--with-tests] [--repair] [-- options of the server]

Nothing is done while what was installed is up to date, nor for options with which the server only prints something.
An installation that was cut short is gone on with. --repair looks at every package, and changes to the build of PyTorch
that fits the GPU. Uses only the standard library and whatever Python >= 3.10 it is started with; pip's own settings
(PIP_INDEX_URL ...) hold.
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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from server.file_lock import try_lock  # noqa: E402
from server.i18n import system_language  # noqa: E402
from system import embedded  # noqa: E402
from system.environment import Environment, Failure  # noqa: E402
from system.repair import forget_half_installed  # noqa: E402

OLDEST, NEWEST = (3, 10), (3, 14)  # Pythons that the pinned PyTorch has wheels for


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    zh = system_language() == "zh"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # consoles that lack Chinese
    if "--" in argv and not will_serve(argv[argv.index("--") + 1 :]):
        return 0
    try:
        install(ROOT, zh, with_tests="--with-tests" in argv, repair="--repair" in argv)
    except Failure as failure:
        print(failure.zh if zh else failure.en, file=sys.stderr)
        return 1
    except OSError as error:
        failure = _cannot_write(Path(error.filename or ROOT), error)
        print(failure.zh if zh else failure.en, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n安装中断了，下次启动会接着装（没下完的那个包重新下）。" if zh else
              "\nInterrupted; the next start goes on (a download under way begins again).", file=sys.stderr)
        return 130
    return 0


def install(root: Path, zh: bool, with_tests: bool = False, repair: bool = False) -> None:
    """Bring the environment of ``root`` to what its requirement files say."""
    bundled = root / "system" / "python"
    in_bundle = bundled in Path(sys.executable).parents
    home = bundled if in_bundle else root / ".venv"
    files = requirement_files(root, in_bundle, with_tests)
    stamp = Stamp(home, root)
    lock = files[0] if in_bundle else None
    environment = Environment(Path(sys.executable) if in_bundle else venv_python(home), root, zh, lock)
    if in_bundle:
        _mend_paths(bundled, environment.say)
    if stamp.is_current(files) and not repair:
        return
    _check_python()
    with one_at_a_time(root / "system" / "install.lock", environment.say) as inherited:
        if stamp.is_current(files) and not repair:  # thanks to the one that was waited for
            return
        if not environment.has_pip():
            _provide_pip(environment, home, lock)
        if stamp.was_cut_short():
            environment.say("上次安装没有完成，现在接着装……", "The last installation was not finished, going on ...")
        if stamp.was_cut_short() or repair:
            for folder in environment.package_folders():
                forget_half_installed(folder)
            if not environment.has_pip():  # it was half installed itself
                _provide_pip(environment, home, lock)
        environment.inherited = inherited
        with stamp.running(files):
            environment.install(files, repair)
    if repair:
        _conclude(root, in_bundle, environment.say)


def requirement_files(root: Path, in_bundle: bool, with_tests: bool = False) -> list[Path]:
    """What says which packages are needed: in a bundle the lock, elsewhere requirements.txt."""
    if in_bundle:
        return [root / "system" / "windows-lock.txt"]
    return [root / "requirements.txt"] + [root / "tests" / "requirements.txt"] * with_tests


def bundle_stamp(root: Path) -> dict[str, str]:
    """The note that a bundle of this checkout carries when all its packages are inside."""
    return Stamp(root, root).hashes(requirement_files(root, in_bundle=True))


def _mend_paths(python: Path, say: Callable[[str, str], None]) -> None:
    try:
        written = embedded.write_paths(python)
    except OSError as error:
        raise _cannot_write(python, error) from None
    if written:
        say(f"{embedded.PTH} 不对或被删掉了，已经写好。", f"{embedded.PTH} was wrong or deleted; it is written anew.")


def _provide_pip(environment: Environment, home: Path, lock: Path | None) -> None:
    if not lock:
        environment.say("正在建立 .venv ……", "Making .venv ...")
        make_venv(home)
    else:
        environment.say("正在安装 pip ……", "Installing pip ...")
        try:
            environment.add_pip(lock.parent / "wheels")
        except (OSError, LookupError) as error:
            raise Failure(f"拿不到 pip（{error}）：请检查网络，或用 PIP_INDEX_URL 换源，再运行一次。",
                          f"pip cannot be had ({error}): check the network, or choose another package index with "
                          "PIP_INDEX_URL, and run this again.") from None
    if not environment.has_pip():
        raise Failure(f"{environment.python} 没有 pip：请重新解压整个程序包。",
                      f"{environment.python} has no pip: unpack the whole bundle again.")


def _conclude(root: Path, in_bundle: bool, say: Callable[[str, str], None]) -> None:
    if in_bundle and (excess := embedded.path_excess(root)) > 0:
        say(f"注意：路径长了 {excess} 个字符，有的程序打不开里面的文件：请移到靠近盘符的地方，如 D:\\chatglm。",
            f"Beware: the folder's path is {excess} characters too long for some programs to open what is in it: move "
            "it nearer to the drive, such as D:\\chatglm.")
    say("一切就绪：双击 开启API服务.bat 启动。", "Everything is in place: start 开启API服务.bat.")


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
        raise _cannot_write(path.parent, error) from None
    with file:
        if not try_lock(file):
            say("另一个安装正在进行，等它结束……", "Another installation is running, waiting for it to end ...")
            while not try_lock(file):
                time.sleep(0.2)
        yield () if os.name == "nt" else (file.fileno(),)


def _cannot_write(folder: Path, error: OSError) -> Failure:
    reason = error.strerror or error
    return Failure(f"不能写入 {folder}（{reason}）：请检查磁盘空间和权限，或把程序移到别的文件夹。",
                   f"Cannot write to {folder} ({reason}): check the disk's space and the permissions, or move the "
                   "program to another folder.")


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
        return not self.was_cut_short() and self.hashes(files).items() <= noted.items()

    def was_cut_short(self) -> bool:
        return self._running.exists()

    @contextlib.contextmanager
    def running(self, files: Sequence[Path]) -> Iterator[None]:
        """The note of a run stays unless all went well: pip may have been killed, or the disk was full."""
        self._running.touch()
        hashes = self.hashes(files)
        yield
        self._done.write_text(json.dumps(hashes), encoding="utf-8")
        self._running.unlink(missing_ok=True)

    def hashes(self, files: Sequence[Path]) -> dict[str, str]:
        names = (path.relative_to(self._root).as_posix() for path in files)
        return {name: hashlib.sha256((self._root / name).read_bytes()).hexdigest() for name in names}


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

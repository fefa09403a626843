"""A Windows to test in, on Linux: wine 10 in a Debian 13 folder of its own, made once and kept.

    python -m tests.windows.rig           makes it (about two minutes, 2.5 GB) and says where it is

Wine 10 is what first runs cmd's exit codes and Rust's DLLs right; older systems do not have it, hence the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT

HERE = Path(__file__).resolve().parent
# as on a Chinese Windows, after "chcp 65001", and on a Western Windows; wine takes the code pages from the locale
LOCALES = {936: "zh_CN.UTF-8", 65001: "bo_CN.UTF-8", 1252: "C.UTF-8"}
VC_RUNTIME = ("msvcp140", "msvcp140_1", "msvcp140_2", "msvcp140_atomic_wait", "msvcp140_codecvt_ids", "concrt140",
              "vcruntime140", "vcruntime140_1", "vcruntime140_threads", "vcomp140")  # fmt: skip
_WINE_DLLS = "usr/lib/x86_64-linux-gnu/wine/x86_64-windows"
_ENTER = 'r=$1; shift; for d in proc dev sys; do mount --bind /$d "$r/root/$d"; done; '
_ENTER += 'mount --bind "$r/lab" "$r/root/lab"; exec chroot "$r/root" /usr/bin/env -i "$@"'


class Unavailable(Exception):
    """Why there can be no such Windows here."""


def cache_folder() -> Path:
    """Where everything that takes long to make is kept: WINDOWS_TEST_CACHE, else the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WINDOWS_TEST_CACHE") or Path(home) / "chatglm-portable-windows")


def run_quietly(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """With nothing to read, and everything that it says as ``stdout``."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="surrogateescape", timeout=timeout,
    )  # fmt: skip


def bundle_cache() -> Path:
    """The part of it that is tools/build_bundle.py's."""
    return cache_folder() / "bundle"


class Rig:
    """Runs Windows programs. The folder ``lab`` is Z:\\lab there."""

    def __init__(self, home: Path):
        self.home, self.lab = home, home / "lab"
        self.system32 = self.lab / "prefix" / "drive_c" / "windows" / "system32"

    def command(self, *argv: str, page: int = 936, folder: str = "/lab", env: Mapping[str, str] | None = None):
        """The argument list that runs ``argv`` in the Debian folder, with nothing of this process' environment."""
        hidden = ",".join(VC_RUNTIME)  # wine's own copies: a fresh Windows has none
        variables = {
            "PATH": "/usr/bin:/bin", "HOME": "/root", "XDG_RUNTIME_DIR": "/tmp", "WINEPREFIX": "/lab/prefix",
            "WINEARCH": "win64", "WINEDEBUG": "-all", "LC_ALL": LOCALES[page], "WINEPATH": r"Z:\lab\shims",
            "WINEDLLOVERRIDES": f"mscoree,mshtml,winedbg.exe,winemenubuilder.exe=;ucrtbase,certutil.exe=n,b;{hidden}=n",
            "KMP_AFFINITY": "disabled",  # libiomp cannot make out wine's processors
            **(env or {}),
        }  # fmt: skip
        settings = [f"{name}={value}" for name, value in variables.items()]
        return ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self.home), f"--chdir={folder}", *settings, *argv]

    def run(self, *argv: str, timeout: float = 300, **how) -> subprocess.CompletedProcess[str]:
        return run_quietly(self.command(*argv, **how), timeout)

    def windows_path(self, path: Path) -> str:
        """How a path under ``lab`` is written on that Windows."""
        return "Z:\\lab\\" + str(path.relative_to(self.lab)).replace("/", "\\")

    def stop(self) -> None:
        """End every Windows program."""
        self.run("wineserver", "-k", timeout=60)


def prepare(home: Path) -> Rig:
    """The Windows in the folder ``home``, made if it is not there. Raises Unavailable where it cannot be made."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable("wine's test machine needs Linux on x86-64")
    if os.geteuid() != 0:
        raise Unavailable("only root can make a Debian folder and enter it: sudo ./run.sh test --windows")
    home.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(home).free < 6e9:
        raise Unavailable(f"{home} needs 6 GB of free disk")
    rig = Rig(home)
    with _alone(home), _step("entering a folder of its own", home):
        _call("unshare", "--mount", "true")
        _host_programs()
        _debian(home)
        _prefix(rig)
    return rig


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _step(name: str, home: Path) -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        said = (error.stdout or "").strip().splitlines()[-3:]
        raise Unavailable(f"{name} in {home}: {error.cmd[0]} failed: {' / '.join(said)}") from None


def _call(*command: str) -> None:
    subprocess.run(["nice", *command], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                   stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip


def _host_programs() -> None:
    missing = [name for name in ("debootstrap", "osslsigncode") if not shutil.which(name)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"{' and '.join(missing)} are not installed")
    _call("apt-get", "update", "-qq")
    _call("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing)


def _debian(home: Path) -> None:
    """Debian 13 with wine, under another name until it is complete."""
    root, part = home / "root", home / "root.part"
    if root.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    _call("debootstrap", "--variant=minbase", "--include=ca-certificates,locales", "trixie", str(part))
    inside = ("chroot", str(part), "env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
    _call(*inside, "apt-get", "install", "-y", "--no-install-recommends", "wine", "wine64", "curl", "libarchive-tools")
    for name in LOCALES.values():
        if not name.startswith("C."):
            _call(*inside, "localedef", "--no-archive", "-i", name.partition(".")[0], "-f", "UTF-8", name)
    _call(*inside, "apt-get", "clean")
    (part / "lab").mkdir(exist_ok=True)
    part.rename(root)


def _prefix(rig: Rig) -> None:
    """Wine's C: drive, with a C runtime that has what numpy calls."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + (HERE / "complex.c").read_bytes()).hexdigest()
    done = rig.lab / "prefix" / "made-by"
    if done.is_file() and done.read_text() == recipe:
        return
    shutil.rmtree(rig.lab / "prefix", ignore_errors=True)
    rig.lab.mkdir(exist_ok=True)
    (rig.lab / "shims").mkdir(exist_ok=True)
    made = rig.run("sh", "-c", "wineboot -i; wineserver -w")
    if not rig.system32.is_dir():
        raise Unavailable(f"wine could not make its C: drive: {made.stdout[-300:]}")
    _complete_runtime(rig)
    done.write_text(recipe)


def _complete_runtime(rig: Rig) -> None:
    """Put a ucrtbase.dll before wine's: complex functions are its own, for all others it names wine's under a new name.

    Every export becomes a forwarder, so that the whole process still has one C runtime.
    """
    import pefile

    original = rig.home / "root" / _WINE_DLLS / "ucrtbase.dll"
    library = pefile.PE(str(original), fast_load=True)
    library.parse_data_directories(directories=[pefile.DIRECTORY_ENTRY["IMAGE_DIRECTORY_ENTRY_EXPORT"]])
    names = [entry.name.decode() for entry in library.DIRECTORY_ENTRY_EXPORT.symbols if entry.name]
    source = (HERE / "complex.c").read_text()
    bases = re.findall(r"TO_(?:REAL|COMPLEX)\((c\w+), |OUT C x_(c\w+)\(C \w, C \w\)", source)
    ours = {name + kind for found in bases for name in found if name for kind in ("", "f", "l")}
    work = rig.lab / "shims"
    used = sorted(set(re.findall(r"\b(\w+)\(double", source.partition("int _fltused")[0])))
    _write_def(work / "ucrtwine.def", "ucrtwine.dll", used)
    lines = [f"{name}=x_{name}" if name in ours else f"{name}=ucrtwine.{name}" for name in names]
    _write_def(work / "ucrtbase.def", "ucrtbase.dll", lines)
    zig("dlltool", "-m", "i386:x86-64", "-d", str(work / "ucrtwine.def"), "-l", str(work / "libucrtwine.a"))
    sources = (HERE / "complex.c", work / "ucrtbase.def", work / "libucrtwine.a")
    bare = ("-shared", "-ffreestanding", "-fno-builtin", "-nostdlib", "-Wl,-e,DllMainCRTStartup")
    compile_for_windows(work / "ucrtbase.dll", *sources, options=bare)
    # without its mark wine takes the copy for a program's DLL like any other
    copy = original.read_bytes().replace(b"Wine builtin DLL", b"Copied from wine", 1)
    (rig.system32 / "ucrtwine.dll").write_bytes(copy)
    shutil.copy(work / "ucrtbase.dll", rig.system32)


def _write_def(path: Path, library: str, lines: list[str]) -> None:
    path.write_text(f"LIBRARY {library}\nEXPORTS\n" + "".join(f"{line}\n" for line in lines))


def compile_for_windows(target: Path, *sources: Path, options: tuple[str, ...] = ()) -> None:
    zig("cc", "-target", "x86_64-windows-gnu", "-mcpu=baseline", "-O2", "-s", *options, "-o", str(target),
        *map(str, sources))  # fmt: skip


def zig(*arguments: str) -> None:
    """Run the compiler that tools/build_bundle.py uses too."""
    from tools.bundle_kernels import zig as program

    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(bundle_cache() / "zig")}
    command = [str(program()), *arguments]
    subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


if __name__ == "__main__":
    from tools.build_bundle import prepare_tools

    prepare_tools(bundle_cache())
    try:
        print(prepare(cache_folder()).home)
    except Unavailable as reason:
        sys.exit(str(reason))
    print(f"run the tests with {ROOT / 'run.sh'} test --windows")

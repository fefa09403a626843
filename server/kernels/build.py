"""Compiling the kernels in ``cpu/`` with whatever C compiler there is, once for each state of their sources."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
READY = SOURCES / "ready"  # libraries that a bundle brings along
# what the compiler may use, best first; the sources choose their code by the macros that these set
VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"],
    "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "plain": [],
}
# sums may be reordered, which vector code needs; infinities and NaN keep their meaning
FLAGS = ["-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"]
FLAGS += ["-ffp-contract=fast"]
WINDOWS = sys.platform == "win32"
SUFFIX = ".dll" if WINDOWS else ".so"
_SECONDS = 300  # for one compilation


class NoKernels(Exception):
    """There is no compiled library, and none can be made; the text says why."""


def load_library(compiler: list[str] | None = None) -> ctypes.CDLL:
    """The compiled kernels: a ready-made library, one compiled earlier, or one compiled now.

    ``compiler``: the beginning of its argument list instead of the one that is found. Raises NoKernels where there is
    no compiler, it fails, or the library can neither be kept nor loaded.
    """
    for path in (_ready(), *_places(compiler)):
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:  # damaged, or of a machine with another libc that used this folder
                log.warning("%s cannot be loaded and is compiled again: %s", path, error)
    path = build(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded: {error}") from error


def build(compiler: list[str] | None = None) -> Path:
    """Compile the library into the first cache that can be written; see ``load_library``."""
    command = compiler or find_compiler()
    if command is None:
        raise NoKernels("no C compiler was found (CC, cc, gcc, clang, or the Python package ziglang)")
    problem = None
    for library in _places(compiler):
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as work:
                os.replace(compile_library(command, Path(work)), library)
            return library
        except OSError as error:  # PermissionError, a read-only or full disk
            problem = error
            if library.is_file():  # Windows replaces no library that another process has made and loaded meanwhile
                return library
    raise NoKernels(f"the compiled kernels cannot be kept: {problem}")


def available() -> bool:
    """Whether ``load_library`` has something to load or to compile with; nothing is loaded or compiled for that."""
    return find_library() is not None or find_compiler() is not None


def find_library() -> Path | None:
    """The library that is there already, ready-made or compiled earlier."""
    return next((path for path in (_ready(), *_places(None)) if path.is_file()), None)


def find_compiler() -> list[str] | None:
    """The command of a C compiler, as the beginning of an argument list."""
    if named := os.environ.get("CC"):
        return shlex.split(named, posix=not WINDOWS)
    # GCC for Windows comes last: simd.h says why it compiles the plain variant only
    for name in ("clang", "ziglang", "gcc") if WINDOWS else ("cc", "gcc", "clang", "ziglang"):
        if name == "ziglang":
            if find_spec(name):
                return [sys.executable, "-m", name, "cc"]
        elif path := shutil.which(name):
            return [path]
    return None


def compile_library(compiler: list[str], work: Path) -> Path:
    """The library, compiled in the folder ``work`` for the machine that the compiler makes programs for.

    A variant that the compiler does not know is left out, but never the plain one. Raises NoKernels with the compiler's
    own words where it fails.
    """
    if Path(compiler[0]).stem == "zig" or "ziglang" in compiler:
        compiler = [*compiler, "-mcpu=baseline"]  # it would use all that this processor has in every variant
    log.info("compiling the CPU kernels with %s", " ".join(compiler))
    target = _run([*compiler, "-dumpmachine"], work)
    windows = "windows" in target or "mingw" in target
    common = FLAGS if windows else [*FLAGS, "-fPIC", "-fvisibility=hidden"]
    jobs = {name: [*common, str(SOURCES / f"{name}.c")] for name in ("threads", "processor")}
    for name, flags in VARIANTS.items():
        if not flags or target.startswith("x86_64"):
            jobs[name] = [*common, *flags, f"-DVARIANT={name}", str(SOURCES / "variant.c")]

    def compile_one(name: str) -> str | None:
        try:
            _run([*compiler, *jobs[name], "-c", "-o", f"{name}.o"], work)
        except NoKernels:
            if name in ("threads", "processor", "plain"):
                raise
            log.info("the compiler knows no %s", name)
            return None
        return f"{name}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [made for made in pool.map(compile_one, jobs) if made]
    library = "made.dll" if windows else "made.so"
    _run([*compiler, "-shared", "-o", library, *objects, *([] if windows else ["-lpthread"])], work)
    return work / library


def _run(command: list[str], work: Path) -> str:
    """What a compiler prints. Raises NoKernels with the first line of what it complains about."""
    environment = {**os.environ, "LC_ALL": "C"}  # complaints in English: the line with "error" in it is the one
    try:
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = [*done.stderr.strip().splitlines(), f"exit {done.returncode}"]
        raise NoKernels(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")
    return done.stdout


def _ready() -> Path:
    return READY / f"cpu-{platform.machine().lower()}{SUFFIX}"


def _places(compiler: list[str] | None) -> list[Path]:
    """Where the library may lie: with the program, or with the user where that folder cannot be written.

    Its name changes with the sources, the flags, the kind of machine and the compiler that was asked for by name.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    asked = compiler or os.environ.get("CC")
    digest.update(repr((FLAGS, VARIANTS, asked, platform.machine(), sys.platform)).encode())
    folders = [SOURCES / "build"]
    home = os.environ.get("LOCALAPPDATA" if WINDOWS else "XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # a user without a home
        folders.append((Path(home) if home else Path.home() / ".cache") / "chatglm-portable")
    return [folder / f"cpu-{digest.hexdigest()[:16]}{SUFFIX}" for folder in folders]

"""Compiling the kernels in ``cpu/`` with whatever C compiler there is, once for each state of their sources."""

from __future__ import annotations

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
WINDOWS = sys.platform == "win32"
SUFFIX = ".dll" if WINDOWS else ".so"
_SECONDS = 300  # for one compilation


class NoKernels(Exception):
    """There is no compiled library, and none can be made; the text says why."""


def load_library() -> ctypes.CDLL:
    """The compiled kernels: a ready-made library, one compiled earlier, or one compiled now.

    Raises NoKernels where there is no compiler, or it fails.
    """
    ready = READY / f"cpu-{platform.machine().lower()}{SUFFIX}"
    return ctypes.CDLL(str(ready if ready.is_file() else build()))


def build() -> Path:
    """The library of these sources for this kind of machine, compiled unless it is in the cache."""
    compiler = find_compiler()
    if compiler is None:
        raise NoKernels("no C compiler was found (CC, cc, gcc, clang, or the Python package ziglang)")
    name = f"cpu-{_key(compiler)}{SUFFIX}"
    for folder in _caches():
        if (folder / name).is_file():
            return folder / name
    for folder in _caches():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = _compile(compiler, Path(work))
                os.replace(made, folder / name)
            return folder / name
        except PermissionError:
            continue
    raise NoKernels(f"no folder for the compiled kernels can be written: {', '.join(map(str, _caches()))}")


def find_compiler() -> list[str] | None:
    """The command of a C compiler, as the beginning of an argument list."""
    if named := os.environ.get("CC"):
        return shlex.split(named, posix=not WINDOWS)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]


def _caches() -> Iterator[Path]:
    """Where compiled libraries are kept: with the program, or with the user where that cannot be written."""
    home = os.environ.get("LOCALAPPDATA" if WINDOWS else "XDG_CACHE_HOME")
    return [SOURCES / "build", (Path(home) if home else Path.home() / ".cache") / "chatglm-portable"]


def _key(compiler: list[str]) -> str:
    """Changes with the sources, the flags, the compiler and the kind of machine."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=60).stdout
    digest.update(repr((FLAGS, VARIANTS, compiler, version, platform.machine(), sys.platform)).encode())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], work: Path) -> Path:
    """Compiles all variants side by side; one that the compiler does not know is left out, but never the plain one."""
    log.info("compiling the CPU kernels with %s", " ".join(compiler))
    common = [*FLAGS] if WINDOWS else [*FLAGS, "-fPIC", "-fvisibility=hidden"]
    jobs = {name: [*common, str(SOURCES / f"{name}.c")] for name in ("threads", "processor")}
    machine = platform.machine().lower()
    for name, flags in VARIANTS.items():
        if not flags or machine in ("x86_64", "amd64"):
            jobs[name] = [*common, *flags, f"-DVARIANT={name}", str(SOURCES / "variant.c")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(jobs, pool.map(lambda job: _run([*compiler, *jobs[job], "-c", "-o", f"{job}.o"], work), jobs)))
    for name in ("threads", "processor", "plain"):
        if done[name]:
            raise NoKernels(f"{' '.join(compiler)} failed: {done[name]}")
    objects = [f"{name}.o" for name, problem in done.items() if not problem]
    library = f"made{SUFFIX}"
    link = [*compiler, "-shared", "-o", library, *objects, *([] if WINDOWS else ["-lpthread"])]
    if problem := _run(link, work):
        raise NoKernels(f"{' '.join(compiler)} failed: {problem}")
    return work / library


def _run(command: list[str], work: Path) -> str:
    """What went wrong, or nothing."""
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else next((line for line in lines if "error" in line), f"exit {done.returncode}")

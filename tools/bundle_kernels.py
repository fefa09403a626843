"""The CPU kernels as a Windows library, compiled on any system, so that users need no compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from server.kernels.build import FLAGS, READY, SOURCES, VARIANTS, NoKernels, compile_library

NAME = "cpu-amd64.dll"  # as server/kernels/build.py asks for it: by platform.machine()
TARGET = "x86_64-windows-gnu"


def compiled(cache: Path) -> Path:
    """The library, from ``cache`` if it was compiled from the same sources.

    Raises NoKernels where zig fails or leaves a variant out: users' processors are not this one.
    """
    digest = hashlib.sha256(repr((FLAGS, VARIANTS, TARGET, version("ziglang"))).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    library = cache / f"kernels-{digest.hexdigest()[:16]}.dll"
    if not library.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        os.environ["ZIG_GLOBAL_CACHE_DIR"] = str(cache / "zig")  # the C runtime that it compiles first
        with tempfile.TemporaryDirectory(dir=cache) as work:
            compiler = [str(zig()), "cc", "-target", TARGET, "-s"]
            made = compile_library(compiler, Path(work))
            content = made.read_bytes()
            if missing := [name for name in VARIANTS if f"linear_{name}\0".encode() not in content]:
                raise NoKernels(f"zig compiled no {', '.join(missing)}")
            os.replace(made, library)
    return library


def zig() -> Path:
    """The program of the package ziglang, which lies in the builder's cache: a new Python would not find it there."""
    return Path(find_spec("ziglang").origin).parent / ("zig.exe" if os.name == "nt" else "zig")


def place(library: Path, root: Path) -> None:
    """Copy the library to where the server in the folder ``root`` looks for it."""
    folder = root / READY.relative_to(SOURCES.parent.parent.parent)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, folder / NAME)


def licence_texts() -> dict[str, bytes]:
    """What the library has in it from others: zig's and mingw-w64's runtime, by file name."""
    home = zig().parent
    texts = {"zig-LICENSE.txt": home / "LICENSE", "mingw-w64-COPYING.txt": home / "lib" / "libc" / "mingw" / "COPYING"}
    return {name: path.read_bytes() for name, path in texts.items()}

"""llama.cpp's tools from source, and a ChatGLM2 checkpoint as its Q4_0 and Q8_0 files.

The source comes with the llama-cpp-python package, and so does gguf, which writes llama.cpp's files.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from server.errors import StartupError

RELEASE = "0.3.36"
TOOLS = ("llama-bench", "llama-server", "llama-quantize")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # all that this processor has
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
FORMATS = {4: "Q4_0", 8: "Q8_0"}
BLOCK_BITS = {4: 4.5, 8: 8.5}  # bits per weight: a float16 scale for 32 of them


def tool(folder: Path, name: str) -> Path:
    """Raises StartupError where ``prepare`` has not been run."""
    return _there(folder / "build" / "llama" / "bin" / name, folder)


def model_file(folder: Path, bits: int) -> Path:
    return _there(folder / f"{FORMATS[bits]}.gguf", folder)


def _there(path: Path, folder: Path) -> Path:
    if not path.exists():
        raise StartupError(
            f"找不到 {path}：请先运行 python -m benchmarks.peers --prepare {folder}。",
            f"There is no {path}: run python -m benchmarks.peers --prepare {folder} first.",
        )
    return path.resolve()


def prepare(folder: Path, checkpoint: Path) -> None:
    """Build the tools and write ``Q4_0.gguf`` and ``Q8_0.gguf``; what is there stays (delete it to make it anew).

    Takes about 20 minutes on 2 cores, and for a model of 6 G parameters 23 GB, of which 12.5 GB only for a while.
    Raises StartupError for a step that fails, ModelError for a checkpoint that is no ChatGLM2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(folder)
    if not all((folder / "build" / "llama" / "bin" / name).exists() for name in TOOLS):
        _build(source, folder / "build" / "llama")
    wanted = [name for name in FORMATS.values() if not (folder / f"{name}.gguf").exists()]
    if wanted:
        from benchmarks.gguf_file import write_gguf

        whole = folder / "F16.gguf.part"
        write_gguf(checkpoint, whole, source / "gguf-py")
        for name in wanted:
            part = folder / f"{name}.gguf.part"
            _run(tool(folder, "llama-quantize"), whole, part, name)
            part.rename(folder / f"{name}.gguf")
        whole.unlink()


def _source(folder: Path) -> Path:
    package = f"llama_cpp_python-{RELEASE}"
    if not (folder / "src" / package).exists():
        _run(
            sys.executable, "-m", "pip", "download", f"llama-cpp-python=={RELEASE}", "--no-deps",
            "--no-binary", "llama-cpp-python", "--dest", folder / "dl",
        )  # fmt: skip
        with tarfile.open(folder / "dl" / f"{package}.tar.gz") as archive:
            archive.extractall(folder / "src", filter="data")
    return folder / "src" / package / "vendor" / "llama.cpp"


def _build(source: Path, build: Path) -> None:
    if not (cmake := shutil.which("cmake")):
        raise StartupError("没有 cmake：请先安装 cmake 和 C++ 编译器。",
                           "There is no cmake: install cmake and a C++ compiler.")
    _run(cmake, "-S", source, "-B", build, *(f"-D{name}={value}" for name, value in OPTIONS.items()))
    _run(cmake, "--build", build, "--parallel", "2", "--target", *TOOLS)


def _run(*command: str | Path) -> None:
    print("$", *command, file=sys.stderr, flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise StartupError(f"{command[0]} 失败（{code}），原因见上面的输出。",
                           f"{command[0]} failed ({code}); its output above says why.")

"""The C kernels are compiled once, by whatever compiler there is, and whatever goes wrong is one sentence."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels import build
from server.kernels.build import NoKernels
from server.kernels.cpu_ops import CpuOps
from tests.conftest import ROOT

COMPILER = build.find_compiler()
FLAGS = build.FLAGS
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler")
scripts = pytest.mark.skipif(os.name == "nt", reason="compilers that are shell scripts")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A program and a user of this test's own; compiling for speed would only take time."""
    sources = tmp_path / "程序 1" / "cpu"
    shutil.copytree(build.SOURCES, sources, ignore=lambda _, names: {"build", "ready"} & set(names))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "READY", sources / "ready")
    monkeypatch.setattr(build, "FLAGS", ["-O0", *build.FLAGS[1:]])
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "用户"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def script(path: Path, text: str) -> list[str]:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return [str(path)]


def recorder(folder: Path) -> list[str]:
    """The compiler; every call of it is a line of the file ``calls``."""
    return script(folder / "compiler", f'echo "$@" >> "{folder}/calls"\nexec {" ".join(COMPILER)} "$@"')


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"cpu-*{build.SUFFIX}"))


@needs_compiler
def test_what_find_compiler_finds_makes_a_library_that_runs():
    """The one test that fails when the kernels cannot be compiled; those of the kernels skip."""
    library = build.load_library()
    assert library.set_threads(1) == 1 and library.supports_plain() == 1
    for variant in build.VARIANTS if ON_X86 else ["plain"]:
        assert hasattr(library, f"linear_{variant}")


@needs_compiler
@scripts
def test_the_second_use_compiles_nothing(folder):
    compiler = recorder(folder)
    first = build.load_library(compiler)
    made = calls(folder)
    assert made >= len(build.VARIANTS if ON_X86 else ["plain"]) + 3
    assert build.load_library(compiler)._name == first._name
    assert calls(folder) == made and kept(folder) == [Path(first._name)]
    assert [path.name for path in build.SOURCES.joinpath("build").iterdir()] == [Path(first._name).name]


@needs_compiler
def test_a_changed_source_is_compiled(folder):
    build.load_library()
    with (build.SOURCES / "threads.c").open("a", encoding="utf-8") as file:
        file.write("EXPORT int is_new(void) { return 7; }\n")
    assert build.load_library().is_new() == 7
    assert len(kept(folder)) == 2


@needs_compiler
@scripts
def test_another_compiler_asked_for_by_name_compiles_again(folder, monkeypatch):
    build.load_library()
    monkeypatch.setenv("CC", recorder(folder)[0])
    build.load_library()
    assert calls(folder) and len(kept(folder)) == 2


def test_no_compiler(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    assert build.find_compiler() is None
    with pytest.raises(NoKernels, match=r"no C compiler was found \(CC, cc, gcc, clang"):
        build.load_library()


@needs_compiler
def test_what_is_compiled_needs_no_compiler_any_more(folder, monkeypatch):
    build.load_library()
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.load_library().set_threads(1) == 1


def test_importing_the_kernels_needs_no_compiler():
    code = "import server.kernels.cpu_ops"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PATH": "", "CC": "/none"}, check=True)


def test_a_compiler_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("CC", f"{folder}/none -O1")
    with pytest.raises(NoKernels, match=r"none failed: .*No such file" if os.name == "posix" else "none failed"):
        build.load_library()
    assert not kept(folder)


@scripts
def test_a_compiler_that_fails(folder, monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")  # in which there would be no word "error"
    text = 'echo "In file x:" >&2; echo "x.c:1: error: no room, in $LC_ALL" >&2; echo "x.c:2: error: more" >&2; exit 1'
    with pytest.raises(NoKernels) as caught:
        build.load_library(script(folder / "broken", text))
    assert str(caught.value) == f"{folder}/broken failed: x.c:1: error: no room, in C"
    with pytest.raises(NoKernels, match="silent failed: exit 3"):
        build.load_library(script(folder / "silent", "exit 3"))


@needs_compiler
def test_sources_that_do_not_compile(folder):
    with (build.SOURCES / "attention.c").open("a", encoding="utf-8") as file:
        file.write("int x = ;\n")
    with pytest.raises(NoKernels, match=r"attention\.c:\d+:\d+: error: expected expression"):
        build.load_library()
    assert not kept(folder)


@needs_compiler
@scripts
@pytest.mark.skipif(not ON_X86, reason="variants of x86-64")
def test_a_compiler_that_does_not_know_every_processor(folder):
    refuse = 'case "$*" in *-mavxvnni*) echo "error: unrecognized -mavxvnni" >&2; exit 1;; esac'
    library = build.load_library(script(folder / "old", f'{refuse}\nexec {" ".join(COMPILER)} "$@"'))
    assert [name for name in build.VARIANTS if hasattr(library, f"linear_{name}")] == ["avx512", "avx2", "plain"]


@needs_compiler
@pytest.mark.parametrize(
    "place",
    [
        "a file in its place",
        pytest.param("/sys", marks=pytest.mark.skipif(not Path("/sys").is_dir(), reason="no folder that is read-only")),
    ],
)
def test_a_program_folder_that_cannot_be_written(folder, place):
    target = build.SOURCES / "build"
    if place == "/sys":
        target.symlink_to("/sys", target_is_directory=True)
    else:
        target.write_bytes(b"")
    assert Path(build.load_library()._name).parent == folder / "用户" / "chatglm-portable"
    assert len(kept(folder)) == 1


@needs_compiler
def test_no_folder_that_can_be_written(folder):
    (build.SOURCES / "build").write_bytes(b"")
    (folder / "用户").write_bytes(b"")
    with pytest.raises(NoKernels, match="the compiled kernels cannot be kept: "):
        build.load_library()


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"\x7fELF of another machine"])
def test_a_damaged_library_is_made_again(folder, content):
    path = build.build()
    path.unlink()  # it may be mapped
    path.write_bytes(content)
    assert build.load_library().set_threads(1) == 1
    assert kept(folder) == [path] and path.stat().st_size > 10_000


@needs_compiler
def test_a_library_that_came_with_the_program_is_used(folder, monkeypatch):
    path = build.READY / f"cpu-{platform.machine().lower()}{build.SUFFIX}"
    path.parent.mkdir()
    os.replace(build.build(), path)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.load_library()._name == str(path)


@needs_compiler
def test_two_processes_at_the_same_time(folder):
    code = (
        "import sys, pathlib; from server.kernels import build; build.FLAGS[0] = '-O0'; "
        "build.SOURCES = pathlib.Path(sys.argv[1]); build.READY = build.SOURCES / 'ready'; "
        "print(build.load_library().set_threads(2))"
    )
    command = [sys.executable, "-c", code, str(build.SOURCES)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["2", "2"]
    assert len(kept(folder)) == 1
    assert list((build.SOURCES / "build").iterdir()) == kept(folder)


def test_an_unknown_variant():
    with pytest.raises(NoKernels, match=r"no avx1024, only .*plain|no C compiler"):
        CpuOps(1, "avx1024")


@pytest.fixture
def zig(monkeypatch):
    pytest.importorskip("ziglang", reason="the package ziglang is not installed")
    # it compiles its C library first, for minutes, and keeps it in the user's true cache
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache" / "zig"))
    monkeypatch.setattr(build, "FLAGS", FLAGS)  # without -O it would add checks
    return [sys.executable, "-m", "ziglang", "cc"]


def test_ziglang(zig, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    assert build.find_compiler() == zig
    library = build.load_library(zig)
    assert library.set_threads(2) == 2
    assert all(hasattr(library, f"linear_{name}") for name in (build.VARIANTS if ON_X86 else ["plain"]))


@pytest.mark.skipif(not (ON_X86 and shutil.which("objdump")), reason="objdump shows what x86-64 code needs")
def test_ziglang_makes_plain_code_for_every_processor(zig, folder):
    """Left alone it uses whatever this processor has, and a library may be carried to another."""
    build.compile_library(zig, folder)
    for name, wide in (("plain", False), ("processor", False), ("threads", False), ("avx2", True)):
        code = subprocess.run(["objdump", "-d", f"{name}.o"], cwd=folder, capture_output=True, text=True, check=True)
        assert ("%ymm" in code.stdout) is wide and "%zmm" not in code.stdout


@pytest.mark.parametrize(
    ("target", "magic", "variants"),
    [
        ("x86_64-windows-gnu", b"MZ", list(build.VARIANTS)),
        ("aarch64-linux-gnu", b"\x7fELF", ["plain"]),
    ],
)
def test_ziglang_for_other_systems(zig, folder, target, magic, variants):
    library = build.compile_library([*zig, "-target", target], folder)
    content = library.read_bytes()
    assert library.suffix == (".dll" if "windows" in target else ".so") and content.startswith(magic)
    assert [name for name in build.VARIANTS if f"linear_{name}\0".encode() in content] == variants

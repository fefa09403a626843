"""The test machine, the bundle and its folder, made once; figures for docs/windows.md at the end."""

import http.server
import socket
import threading
import time
import zipfile
from pathlib import Path

import pytest

from tests.windows import rig as rigs
from tests.windows.bundle import Bundle
from tools import build_bundle

NASTY = "桌面/chat glm (1) & Co! 模型🙂"
CUDA = ("--build", "cu126", "--python", "copy")
figures: dict[str, str] = {}


@pytest.fixture(scope="session")
def tools() -> Path:
    """The bundle's cache, with the builder's tools importable."""
    cache = rigs.bundle_cache()
    cache.mkdir(parents=True, exist_ok=True)
    try:
        build_bundle.prepare_tools(cache)
    except SystemExit:
        pytest.skip("the builder's tools cannot be fetched: is there a network?")
    return cache


@pytest.fixture(scope="session")
def rig(tools):
    try:
        machine = rigs.prepare(rigs.cache_folder())
    except rigs.Unavailable as reason:
        pytest.skip(f"no Windows to test in: {reason}")
    _compile_shims(machine)
    machine.stop()
    machine.run("sh", "-c", "wineserver -p >/dev/null 2>&1")  # Windows is booted once
    yield machine
    machine.stop()


def _compile_shims(rig) -> None:
    """Programs that a test needs on PATH; none stands for a part of the product."""
    for name in ("browser", "nvidia-smi"):
        source = rigs.HERE / "programs" / f"{name}.c"
        target = rig.lab / "shims" / f"{name}.exe"
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            rigs.compile_for_windows(target, source)


@pytest.fixture(scope="session")
def archive(tools) -> Path:
    """The CPU bundle, built from this checkout."""
    started = time.monotonic()
    out = rigs.cache_folder() / "dist"
    assert build_bundle.main(["--python", "copy", "--out", str(out), "--cache", str(tools)]) == 0
    (made,) = out.glob("chatglm-portable-*-cpu.zip")
    figures["built in"] = f"{time.monotonic() - started:.0f} s"
    figures["size of the zip"] = f"{made.stat().st_size / 1e6:.0f} MB"
    return made


@pytest.fixture(scope="session")
def cuda_archive(tools, tmp_path_factory) -> Path:
    """The bundle for CUDA without PyTorch: the first start fetches it."""
    out = tmp_path_factory.mktemp("cuda")
    assert build_bundle.main([*CUDA, "--out", str(out), "--cache", str(tools)]) == 0
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="session")
def bundle(rig, archive) -> Bundle:
    """The bundle, unpacked into a folder whose name has all that breaks careless launchers."""
    return unpack(rig, archive, NASTY)


def unpack(rig, archive: Path, folder: str) -> Bundle:
    import shutil

    target = rig.lab / folder
    shutil.rmtree(target, ignore_errors=True)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(target)
    return Bundle(rig, target / "chatglm-portable")


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def index(tmp_path):
    """A package index on this machine: a folder of wheels per package, as pip and its mirrors lay it out."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    (tmp_path / "simple").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *request: Quiet(*request, directory=str(tmp_path / "simple"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Index(tmp_path / "simple", f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


class Index:
    def __init__(self, folder: Path, url: str):
        self.folder, self.url, self.flat = folder, url, folder / "flat"
        self.flat.mkdir()

    def add(self, wheel: Path) -> None:
        package = wheel.name.partition("-")[0].lower().replace("_", "-")
        (self.folder / package).mkdir(exist_ok=True)
        for folder in (self.folder / package, self.flat):
            (folder / wheel.name).symlink_to(wheel)


def pytest_terminal_summary(terminalreporter) -> None:
    if figures:
        terminalreporter.section("the bundle on Windows")
        for name, value in figures.items():
            terminalreporter.write_line(f"{name}: {value}")



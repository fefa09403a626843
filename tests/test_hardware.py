import os
import shlex
import stat
import sys
import time

import pytest

from server import hardware
from server.hardware import GPU, Hardware, parse_smi, probe

SMI = """\
0, GPU-5a1b, NVIDIA GeForce RTX 3060, 12288, 11264, 8.6, 560.35.03
1, GPU-77c2, NVIDIA GeForce GTX 1060 6GB, 6144, 5900, 6.1, 560.35.03
"""
MIB = 2**20


def test_this_machine(tmp_path):
    import psutil

    started = time.perf_counter()
    found = probe(tmp_path / "not" / "yet")
    assert time.perf_counter() - started < 3
    assert 0 < found.ram_available <= found.ram_total == psutil.virtual_memory().total
    assert 1 <= found.cores <= found.threads <= os.cpu_count()
    assert found.disk_free > 0
    assert all(0 <= gpu.free <= gpu.total for gpu in found.gpus)


def test_torch_build_is_read_without_importing_torch(tmp_path):
    torch = pytest.importorskip("torch")
    assert probe(tmp_path).torch_cuda == torch.version.cuda


def test_smi_output():
    gpus, driver = parse_smi(SMI)
    assert driver == "560.35.03"
    assert gpus[0] == GPU(0, "NVIDIA GeForce RTX 3060", 12288 * MIB, 11264 * MIB, (8, 6), "GPU-5a1b")
    assert gpus[1].capability == (6, 1)


def test_smi_without_capability():
    gpus, _ = parse_smi("0, GPU-1, Tesla K80, 11441, 11441, [N/A], 390.1\n")
    assert gpus[0].capability is None


@pytest.mark.parametrize("text", ["", "\n"])
def test_smi_without_gpus(text):
    assert parse_smi(text) is None


@pytest.mark.parametrize("text", ["No devices were found", "0, GPU-1, X, [N/A], [N/A], 8.6, 1"])
def test_smi_with_other_text(text):
    with pytest.raises(ValueError):
        parse_smi(text)


@pytest.fixture
def smi_program(tmp_path, monkeypatch):
    """A program called nvidia-smi that comes first on PATH."""
    if os.name == "nt":
        pytest.skip("a script is not a program on Windows")

    def install(body: str):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(body)}\n")  # spaces in paths
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.setattr(hardware, "_nvml", lambda: None)

    return install


def test_smi_is_asked_when_nvml_does_not_load(smi_program, tmp_path):
    smi_program(f"print({SMI!r}, end='')")
    found = probe(tmp_path, env={})
    assert [gpu.free for gpu in found.gpus] == [11264 * MIB, 5900 * MIB]
    assert found.driver == "560.35.03"


NOT_UTF8 = "import sys; sys.stdout.buffer.write(b'\\xff')"


@pytest.mark.parametrize("body", ["raise SystemExit(9)", "print('oops')", NOT_UTF8, "print('x' * 200_000)"])
def test_smi_that_fails(smi_program, body, tmp_path):
    smi_program(body)
    assert probe(tmp_path, env={}).gpus == ()


def test_smi_that_hangs(smi_program, monkeypatch, tmp_path):
    smi_program("import time; time.sleep(60)")
    monkeypatch.setattr(hardware, "SMI_TIMEOUT_S", 0.3)
    started = time.perf_counter()
    assert probe(tmp_path, env={}).gpus == ()
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["NVIDIA GeForce GTX 1060 6GB"]),
        ("1,0", ["NVIDIA GeForce GTX 1060 6GB", "NVIDIA GeForce RTX 3060"]),
        ("GPU-77", ["NVIDIA GeForce GTX 1060 6GB"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["NVIDIA GeForce RTX 3060"]),
    ],
)
def test_cuda_visible_devices(smi_program, visible, names, tmp_path):
    smi_program(f"print({SMI!r}, end='')")
    gpus = probe(tmp_path, env={"CUDA_VISIBLE_DEVICES": visible}).gpus
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_empty_hardware_is_valid():
    assert Hardware().gpus == ()

"""What the checks make of memory, GPUs, PyTorch and kernels: the profile, and why."""

import dataclasses
import sys
from pathlib import Path

import pytest

from server import memory as memory_module
from server.doctor.checks import all_checks
from server.doctor.children import ChildFailed
from server.doctor.graphics import adapter_name, judge_gpus, linux_adapters
from server.doctor.host import (
    SETUP,
)
from server.doctor.machine import Gpus, Machine
from server.doctor.plan import beside_itself, judge_memory, judge_needs, judge_profile
from server.doctor.result import conclude, problem
from server.doctor.runtime import NEWER_RUNTIME, RUNTIME, find_file, judge_kernels, judge_runtime, judge_torch
from server.download.editions import SHAPES
from server.hardware import GPU, Hardware
from server.memory import Memory, parse_meminfo, read_memory
from server.profiles import Config, Note, choose
from tests.doctor.judged import GIB, OK, PROBLEM, WARNING, judged

# memory


def test_meminfo():
    text = "MemTotal:  16000000 kB\nMemFree:  1 kB\nMemAvailable: 8000000 kB\nSwapTotal: 2000 kB\nSwapFree: 1000 kB\n"
    assert parse_meminfo(text) == Memory(16000000 << 10, 8000000 << 10, 2000 << 10, 8001000 << 10)
    assert parse_meminfo("MemTotal: 5 kB\nMemFree: 2 kB\nHugePages_Total:  0\n").available == 2048
    assert parse_meminfo("") == Memory(0, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS tells only psutil, Windows itself")
def test_memory_without_proc_and_without_psutil(monkeypatch):
    real = read_memory()
    monkeypatch.setattr(memory_module, "_MEMINFO", Path("/no/such/file"))
    with_psutil = read_memory()
    monkeypatch.setitem(sys.modules, "psutil", None)
    without = read_memory()
    assert with_psutil.total == without.total == real.total
    assert 0 < without.available <= real.total
    monkeypatch.setattr(memory_module.os, "sysconf", lambda name: -1)
    assert read_memory() == Memory(0, 0, 0, 0)
    judged(judge_memory(Memory(0, 0, 0, 0), "linux"), WARNING, "does not say", "/proc")


@pytest.mark.parametrize(
    ("memory", "system", "state", "word"),
    [
        (Memory(16 * GIB, 10 * GIB, 8 * GIB, 18 * GIB), "win32", OK, "page file 8.0 GiB"),
        (Memory(16 * GIB, 10 * GIB, 0, 10 * GIB), "win32", WARNING, "1455"),
        (Memory(64 * GIB, 50 * GIB, 0, 50 * GIB), "win32", OK, ""),
        (Memory(16 * GIB, 10 * GIB, 0, 10 * GIB), "linux", OK, "swap 0.0 GiB"),
        (Memory(4 * GIB, 3 * GIB, 0, 3 * GIB), "linux", WARNING, "--model demo"),
    ],
)
def test_memory(memory, system, state, word):
    judged(judge_memory(memory, system), state, word)


# GPUs

CARD = GPU(0, "NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, (8, 6))


@pytest.mark.parametrize(
    ("found", "adapters", "env", "state", "word"),
    [
        (Gpus((CARD,), "560.35"), ("NVIDIA",), {}, OK, "compute capability 8.6, 11.0 GiB of 12.0 GiB"),
        (Gpus((), None), (), {}, OK, "the CPU computes"),
        (Gpus((), None), ("Intel(R) UHD Graphics 630",), {}, OK, "Intel(R) UHD"),
        (Gpus((), None), ("NVIDIA GeForce RTX 3060",), {}, PROBLEM, "does not answer"),
        (Gpus((), None, ChildFailed("0xC0000005 access violation")), (), {}, PROBLEM, "access violation"),
        (Gpus((CARD,), "472.12"), (), {}, PROBLEM, "PyTorch needs 525"),
        (Gpus((dataclasses.replace(CARD, capability=(3, 7)),), "560.35"), (), {}, WARNING, "too old"),
        (Gpus((dataclasses.replace(CARD, total=4 * GIB, free=4 * GIB),), "560.35"), (), {}, WARNING, "less than 6 GB"),
        (Gpus((dataclasses.replace(CARD, free=2 * GIB),), "560.35"), (), {}, WARNING, "hold the GPU's memory"),
        (Gpus((CARD,), "560.35"), (), {"CUDA_VISIBLE_DEVICES": "1"}, WARNING, "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_gpus(found, adapters, env, state, word):
    judged(judge_gpus(found, adapters, env), state, word)


def test_a_driver_that_names_no_gpu():
    judged(judge_gpus(Gpus((), None), (), {}, has_smi=True), WARNING, "nvidia-smi", "the CPU computes")
    judged(judge_gpus(Gpus((CARD,), "560.35"), (), {}, has_smi=True), OK)


@pytest.mark.parametrize(
    ("device", "description", "name"),
    [
        (r"PCI\VEN_10DE&DEV_2504\4&2", "@oem5.inf,%dev_2504%;NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 3060"),
        (r"PCI\VEN_10DE&DEV_2504\4&2", "@x.inf,%basic%;Microsoft 基本显示适配器", "Microsoft 基本显示适配器 (NVIDIA)"),
        (r"PCI\VEN_8086&DEV_3E92\3&1", "Intel(R) UHD Graphics 630", "Intel(R) UHD Graphics 630"),
        (r"PCI\VEN_1002&DEV_73BF\3&1", "", r"PCI\VEN_1002&DEV_73BF"),
    ],
)
def test_adapters_that_windows_sees(device, description, name):
    assert adapter_name(device, description) == name


def test_adapters_that_linux_sees(tmp_path):
    for name, kind, vendor in (("a", "0x030000", "0x10de"), ("b", "0x020000", "0x8086"), ("c", "0x038000", "0x1002")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "class").write_text(f"{kind}\n")
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
    (tmp_path / "d").mkdir()
    assert linux_adapters(tmp_path) == ("NVIDIA", "PCI vendor 1002")
    assert linux_adapters(tmp_path / "none") == ()


# what computes


def test_runtime(tmp_path):
    everything = dict.fromkeys((*RUNTIME, *NEWER_RUNTIME), r"C:\Windows\System32\x.dll")
    judged(judge_runtime(everything), OK, "5 of 5")
    judged(judge_runtime({**everything, "msvcp140.dll": None}), PROBLEM, "msvcp140.dll", "vc_redist.x64.exe")
    judged(judge_runtime({**everything, "vcruntime140_threads.dll": None}), WARNING, "vcruntime140_threads.dll")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.dll").touch()
    assert find_file("x.dll", [tmp_path / "a", tmp_path / "b"]) == str(tmp_path / "b" / "x.dll")
    assert find_file("y.dll", [tmp_path / "b"]) is None


CPU = {"version": "2.13.0+cpu", "cuda": None, "devices": 0, "architectures": []}
CUDA = {"version": "2.13.0+cu126", "cuda": "12.6", "devices": 1, "architectures": ["sm_86"]}


@pytest.mark.parametrize(
    ("found", "has_gpu", "state", "words"),
    [
        (CPU, False, OK, ["2.13.0+cpu, built for CPU"]),
        (CPU, True, WARNING, ["does not use it", "update the driver", SETUP[1]]),
        (CUDA, True, OK, ["built for CUDA 12.6"]),
        ({**CUDA, "cuda_error": "driver too old"}, True, PROBLEM, ["driver too old", "525 or later"]),
        ({**CUDA, "cuda_error": "no driver"}, False, OK, []),
        ({**CPU, "error": "1 + 1 is 3"}, False, PROBLEM, ["1 + 1 is 3"]),
        ({"error": "ModuleNotFoundError: No module named 'torch'", "kind": "ModuleNotFoundError"}, False, PROBLEM,
         ["not installed", SETUP[1]]),
        ({"error": "OSError: [WinError 126] ... c10.dll", "kind": "OSError"}, False, PROBLEM, ["vc_redist.x64.exe"]),
        ({"error": "OSError: [WinError 1455] 页面文件太小", "kind": "OSError"}, False, PROBLEM, ["Virtual memory"]),
        ({"error": "OSError: [WinError 4551] blocked", "kind": "OSError"}, False, PROBLEM, ["virus scanner", "trust"]),
        ({"error": "OSError: [WinError 1260] c10.dll", "kind": "OSError"}, False, PROBLEM, ["virus scanner"]),
        ({"error": "ImportError: x", "kind": "ImportError"}, False, PROBLEM, ["ImportError: x", SETUP[1]]),
        (ChildFailed("SIGILL", "last words"), False, PROBLEM, ["SIGILL"]),
        (ChildFailed("no answer within 95 s"), False, PROBLEM, ["no answer within 95 s"]),
    ],
)
def test_torch(found, has_gpu, state, words):
    judged(judge_torch(found, has_gpu), state, *words)


@pytest.mark.parametrize(("visible", "state"), [(None, WARNING), ("", OK), ("0", WARNING)])
def test_pytorch_need_not_use_gpus_that_were_hidden(visible, state):
    machine = Machine(Config(model="demo"), env={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    machine.gpus, machine.torch = lambda: Gpus((CARD,), "560.35"), lambda: CPU
    (check,) = [check for check in all_checks(machine, None) if check.id == "torch"]
    assert check.run().state is state


@pytest.mark.parametrize(
    ("loaded", "compiler", "on_gpu", "state", "kind", "word"),
    [
        ({"library": "/x.so"}, None, False, OK, "compiled", "compiled: /x.so"),
        ({"library": None}, ["cc"], False, OK, "can be compiled", "with cc"),
        ({"error": "OSError: bad"}, ["cc"], False, WARNING, "can be compiled", "OSError: bad"),
        (ChildFailed("SIGBUS"), ["cc"], False, WARNING, "can be compiled", "SIGBUS"),
        ({"library": None}, None, False, WARNING, "none", "ziglang"),
        (ChildFailed("SIGBUS"), None, False, WARNING, "none", "ziglang"),
        ({"library": None}, None, True, OK, "none", "not needed on a GPU"),
    ],
)
def test_kernels(loaded, compiler, on_gpu, state, kind, word):
    result = judged(judge_kernels(loaded, compiler, on_gpu), state, word)
    assert result.facts["state"] == kind


# the plan: real profiles of the real table

SHAPE = SHAPES["chatglm2-6b"]


def plan(hardware, **options):
    return choose(hardware, SHAPE, Config(**options))


def test_profile_says_why():
    profile = plan(Hardware(gpus=(CARD,), torch_cuda="12.6", ram_available=8 * GIB))
    result = judged(judge_profile(profile), OK, "medium (int8", "cuda:0", "has 11.0 GiB free")
    assert result.facts["name"] == "medium" and result.facts["bits"] == 8
    small = plan(Hardware(gpus=(CARD,), torch_cuda=None, ram_available=8 * GIB, kernels=True))
    judged(judge_profile(small), WARNING, "PyTorch was installed for the CPU")


def test_a_running_server_lacks_what_it_holds_itself():
    lacking = conclude(Note("约需 6 GiB", "about 6 GiB"), [problem("不够", "too little", do=("关", "close"))])
    judged(beside_itself(lacking), WARNING, "too little", "this program is running", "close")
    fine = conclude(Note("好", "fine"))
    assert beside_itself(fine) is fine


def test_needs_are_of_the_device_that_computes():
    hardware = Hardware(gpus=(CARD,), torch_cuda="12.6", ram_available=8 * GIB)
    memory = Memory(16 * GIB, 3 * GIB, 0, 3 * GIB)
    result = judged(judge_needs(plan(hardware), 6 * GIB, hardware, memory), OK, "GPU memory", "11.0 GiB is free")
    assert result.facts["free"] == 11 * GIB
    forced = plan(hardware, profile="large")
    judged(judge_needs(forced, 12 * GIB, hardware, memory), PROBLEM, "too little", "--profile small")
    hardware = Hardware(ram_available=8 * GIB, kernels=True)
    roomy = Memory(16 * GIB, 8 * GIB, 0, 8 * GIB)
    judged(judge_needs(plan(hardware), 4 * GIB, hardware, roomy), OK, "of memory", "8.0 GiB is free")
    tight = Memory(16 * GIB, 8 * GIB, 0, 2 * GIB)
    judged(judge_needs(plan(hardware), 4 * GIB, hardware, tight), WARNING, "page file")

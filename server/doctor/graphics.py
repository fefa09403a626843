"""GPUs and their driver."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from server.doctor.machine import Gpus
from server.doctor.result import Complaint, Result, conclude, gib, problem, warning
from server.footprint import GiB
from server.hardware import GPU
from server.profiles import OLDEST_GPU, TIERS, Note
from system.torch_builds import CUDA_BUILDS

NVIDIA = 0x10DE  # PCI's number for the vendor
_DISPLAY_CLASS = "{4d36e968-e325-11ce-bfc1-08002be10318}"  # GUID_DEVCLASS_DISPLAY
_ONLY_PRESENT, _OF_CLASS = 0x100, 0x200  # CM_GETIDLIST_FILTER_PRESENT, CM_GETIDLIST_FILTER_CLASS
OLDEST_DRIVER = min(driver for driver, _ in CUDA_BUILDS.values())
OLDEST_CAPABILITY = min(OLDEST_GPU.values())
DRIVER = ("从 nvidia.cn/drivers 装最新的显卡驱动，然后重启", "install the latest driver from nvidia.com/drivers, then "
          "restart")  # fmt: skip


def find_adapters() -> tuple[str, ...]:
    """The names of the graphics adapters that the system sees, whether or not their drivers work."""
    return _windows_adapters() if sys.platform == "win32" else linux_adapters(Path("/sys/bus/pci/devices"))


def linux_adapters(devices: Path) -> tuple[str, ...]:
    """Of PCI's display class; the kernel knows numbers, so only NVIDIA is named."""
    names = []
    for device in sorted(devices.glob("*")):
        try:
            kind, vendor = (int((device / name).read_text(), 16) for name in ("class", "vendor"))
        except (OSError, ValueError):
            continue
        if kind >> 16 == 0x03:
            names.append("NVIDIA" if vendor == NVIDIA else f"PCI vendor {vendor:04x}")
    return tuple(names)


def _windows_adapters() -> tuple[str, ...]:
    return tuple(adapter_name(device, _description(device)) for device in _present_devices())


def _present_devices() -> list[str]:
    r"""As Windows calls them, PCI\VEN_10DE&DEV_2504&...: the adapters that are there now; the registry keeps all that
    ever were. See CM_Get_Device_ID_ListW in Microsoft's documentation of cfgmgr32."""
    import ctypes

    size, flags = ctypes.c_ulong(), _ONLY_PRESENT | _OF_CLASS
    try:
        library = ctypes.WinDLL("cfgmgr32")
        if library.CM_Get_Device_ID_List_SizeW(ctypes.byref(size), _DISPLAY_CLASS, flags):
            return []
        devices = ctypes.create_unicode_buffer(size.value + 1)
        if library.CM_Get_Device_ID_ListW(_DISPLAY_CLASS, devices, size, flags):
            return []
    except (OSError, AttributeError):  # AttributeError: older than Windows 7
        return []
    return [device for device in devices[:].split("\0") if device]


def _description(device: str) -> str:
    import winreg

    with contextlib.suppress(OSError):
        key = winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, rf"SYSTEM\CurrentControlSet\Enum\{device}")
        with key:
            return str(winreg.QueryValueEx(key, "DeviceDesc")[0])
    return ""


def adapter_name(device: str, description: str) -> str:
    """From "@oem5.inf,%dev_2504%;NVIDIA GeForce RTX 3060"; the vendor's name too where Windows' own driver has none."""
    name = description.rpartition(";")[2] or device.rpartition("\\")[0]
    is_nvidia = f"VEN_{NVIDIA:04X}" in device.upper() and "nvidia" not in name.lower()
    return f"{name} (NVIDIA)" if is_nvidia else name


def judge_gpus(found: Gpus, adapters: tuple[str, ...], env: Mapping[str, str], has_smi: bool = False) -> Result:
    """``adapters``: what ``find_adapters`` named; ``has_smi``: the driver's program nvidia-smi is installed."""
    complaints: list[Complaint] = []
    facts = {"gpus": [dataclasses.asdict(gpu) for gpu in found.gpus],
             "driver": found.driver, "adapters": list(adapters)}  # fmt: skip
    if found.failure:
        text = str(found.failure)
        complaints.append(problem(f"查询显卡的程序出错了（{text}），多半是驱动坏了",
                                  f"asking for the GPUs failed ({text}), mostly for a broken driver", do=DRIVER))
    elif not found.gpus and any("nvidia" in name.lower() for name in adapters):
        complaints.append(problem("有 NVIDIA 显卡，但它的驱动没有回答",
                                  "there is an NVIDIA GPU, but its driver does not answer", do=DRIVER))
    elif not found.gpus and has_smi:
        complaints.append(warning("装了 NVIDIA 的驱动（有 nvidia-smi），但它没有报出显卡",
                                  "NVIDIA's driver is installed (there is nvidia-smi), but it names no GPU", do=DRIVER))
    if not found.gpus:
        others = "、".join(adapters)
        said = Note("没有可用的 NVIDIA 显卡，用 CPU 计算" + (f"（{others}）" if others else ""),
                    "no NVIDIA GPU can be used, the CPU computes" + (f" ({', '.join(adapters)})" if others else ""))
        return conclude(said, complaints, facts=facts)
    complaints += _driver_complaints(found.driver)
    complaints += _gpu_complaints(found.gpus)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        complaints.append(warning(f"环境变量 CUDA_VISIBLE_DEVICES={visible} 只让程序看到这些显卡",
                                  f"CUDA_VISIBLE_DEVICES={visible} in the environment hides all others",
                                  do=("不是有意的就删掉它", "remove it unless it is meant")))
    return conclude(_said(found), complaints, facts=facts)


def _said(found: Gpus) -> Note:
    zh, en = [], []
    for gpu in found.gpus:
        capability = ".".join(map(str, gpu.capability)) if gpu.capability else "?"
        zh.append(f"cuda:{gpu.index} {gpu.name}，计算能力 {capability}，显存空闲 {gib(gpu.free)}，共 {gib(gpu.total)}")
        en.append(f"cuda:{gpu.index} {gpu.name}, compute capability {capability}, {gib(gpu.free)} of {gib(gpu.total)} "
                  "are free")  # fmt: skip
    return Note("；".join([*zh, f"驱动 {found.driver}"]), "; ".join([*en, f"driver {found.driver}"]))


def _driver_complaints(driver: str | None) -> list[Complaint]:
    major = re.match(r"\d+", driver or "")
    if not major or int(major[0]) >= OLDEST_DRIVER:
        return []
    return [problem(f"驱动太旧，PyTorch 至少要 {OLDEST_DRIVER}",
                    f"the driver is too old: PyTorch needs {OLDEST_DRIVER}", do=DRIVER)]  # fmt: skip


def _gpu_complaints(gpus: tuple[GPU, ...]) -> list[Complaint]:
    newest = max(gpu.capability or OLDEST_CAPABILITY for gpu in gpus)
    if newest < OLDEST_CAPABILITY:
        return [warning("显卡太旧，PyTorch 不支持，用 CPU 计算", "too old for PyTorch, the CPU computes",
                        do=("换计算能力 5.0 以上的显卡，或就用 CPU",
                            "use a GPU of compute capability 5.0 or more, or the CPU"))]  # fmt: skip
    least, best = TIERS["small"].memory, max(gpus, key=lambda gpu: gpu.free)
    if best.total < least - GiB // 2:  # a "6 GB" card has a little less
        return [warning("显存不到 6 GB，6B 的模型放不下", "less than 6 GB: a 6B model does not fit",
                        do=("用 CPU 计算（自动），或用 --model demo 试小模型",
                            "the CPU computes (chosen by itself), or try --model demo"))]  # fmt: skip
    if best.free < least - GiB // 2:
        return [warning("显存被别的程序占用了", "other programs hold the GPU's memory",
                        do=("关掉游戏、浏览器和别的 AI 程序再启动",
                            "close games, browsers and other AI programs before starting"))]  # fmt: skip
    return []

"""What this machine has: GPUs, memory, cores, disk. Never fails, never imports torch."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.kernels import build
from server.memory import read_memory

SMI_TIMEOUT_S = 5.0
_SMI_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap", "driver_version")


@dataclass(frozen=True)
class GPU:
    """An NVIDIA GPU. ``index`` is torch's with CUDA_DEVICE_ORDER=PCI_BUS_ID; sizes are bytes."""

    index: int
    name: str
    total: int
    free: int
    capability: tuple[int, int] | None = None  # compute capability, None if the driver does not tell
    uuid: str = ""


@dataclass(frozen=True)
class Hardware:
    """One look at the machine; sizes are bytes.

    ``driver`` is NVIDIA's version; ``torch_cuda`` the CUDA version that the installed PyTorch was built for (None: a
    CPU build, or none installed).
    """

    gpus: tuple[GPU, ...] = ()
    driver: str | None = None
    torch_cuda: str | None = None
    ram_total: int = 0
    ram_available: int = 0
    cores: int = 1  # physical ones that this process may use
    threads: int = 0  # logical ones, two to a core with hyper-threading
    disk_free: int = 0
    kernels: bool = False  # whether the CPU kernels are compiled, or can be


def find_gpus() -> tuple[tuple[GPU, ...], str | None]:
    """All NVIDIA GPUs and the driver's version, asked of the driver's library in this process, or of nvidia-smi."""
    return _nvml() or _nvidia_smi() or ((), None)


def probe(
    path: Path,
    env: Mapping[str, str] = os.environ,
    look_for_gpus: Callable[[], tuple[tuple[GPU, ...], str | None]] = find_gpus,
) -> Hardware:
    """Look at the machine; ``disk_free`` is that of the disk on which ``path`` is or will be."""
    gpus, driver = look_for_gpus()
    memory = read_memory()
    return Hardware(
        gpus=_visible(gpus, env.get("CUDA_VISIBLE_DEVICES")),
        driver=driver,
        torch_cuda=_torch_cuda(),
        ram_total=memory.total,
        ram_available=memory.available,
        cores=min(_physical_cores() or _allowed(), _allowed()),
        threads=_allowed(),
        disk_free=disk_free(path),
        kernels=build.available(),
    )


def disk_free(path: Path) -> int:
    """Free bytes where ``path`` is, or where its nearest existing parent is."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _allowed() -> int:
    """The logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical_cores() -> int | None:
    try:
        import psutil

        return psutil.cpu_count(logical=False)
    except Exception:  # the doctor runs without packages; without /proc it fails
        return None


def _nvml() -> tuple[tuple[GPU, ...], str] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, a broken one, or a library that does not load: nvidia-smi may know more
        return None
    try:
        found = [_nvml_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(found), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _nvml_gpu(pynvml, index: int) -> GPU:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return GPU(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        total=memory.total,
        free=memory.free,
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        uuid=pynvml.nvmlDeviceGetUUID(handle),
    )


def _nvidia_smi() -> tuple[tuple[GPU, ...], str] | None:
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [program, "--query-gpu=" + ",".join(_SMI_FIELDS), "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SMI_TIMEOUT_S, check=True)
        return parse_smi(done.stdout.decode(errors="replace"))
    except (OSError, subprocess.SubprocessError, ValueError, csv.Error):
        return None


def parse_smi(output: str) -> tuple[tuple[GPU, ...], str] | None:
    """GPUs and driver from nvidia-smi's csv of ``_SMI_FIELDS`` (sizes in MiB); raises ValueError for other text."""
    rows = [row for row in csv.reader(output.splitlines(), skipinitialspace=True) if row]
    gpus = []
    for index, uuid, name, total, free, capability, _ in rows:
        match = re.fullmatch(r"(\d+)\.(\d+)", capability)
        version = (int(match[1]), int(match[2])) if match else None
        gpus.append(GPU(int(index), name, int(total) << 20, int(free) << 20, version, uuid))
    return (tuple(gpus), rows[0][-1]) if rows else None


def _visible(gpus: tuple[GPU, ...], chosen: str | None) -> tuple[GPU, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, numbered anew as CUDA does; it ends at the first unknown one."""
    if chosen is None:
        return gpus
    visible = []
    for word in filter(None, chosen.split(",")):
        word = word.strip()
        gpu = next((g for g in gpus if word == str(g.index) or (word[:3] == "GPU" and g.uuid.startswith(word))), None)
        if gpu is None:
            break
        visible.append(GPU(len(visible), gpu.name, gpu.total, gpu.free, gpu.capability, gpu.uuid))
    return tuple(visible)


def _torch_cuda() -> str | None:
    # read, not imported: importing torch takes seconds, and its version file says what it was built for
    try:
        spec = importlib.util.find_spec("torch")
        if not spec or not spec.origin:
            return None
        built = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: what has no specification
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", built, re.MULTILINE)
    return match[1] if match else None


def lan_addresses() -> list[str]:
    """IPv4 addresses under which other machines may reach this one; virtual and unconnected interfaces left out."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name in up and not name.lower().startswith(("lo", "docker", "br-", "veth", "virbr", "vethernet")):
            found += [a.address for a in addresses if a.family is socket.AF_INET]
    # 169.254 is what a machine calls itself when nobody gave it an address
    return [address for address in found if not address.startswith(("127.", "169.254."))]

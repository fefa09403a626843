"""How much memory this machine has and has left, without any package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")


class Memory(NamedTuple):
    """Sizes in bytes, 0 where the system does not say.

    ``reservable`` is what programs may still ask for: on Windows that is what the page file and the RAM have together,
    and a program that asks for more fails with error 1455 even while RAM is free.
    """

    total: int
    available: int
    page_file: int  # swap, as Linux calls it
    reservable: int


def read_memory() -> Memory:
    """Raises nothing but what an unknown system's psutil raises."""
    if sys.platform == "win32":
        return _windows()
    if _MEMINFO.exists():
        return parse_meminfo(_MEMINFO.read_text(encoding="ascii", errors="replace"))
    import psutil

    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return Memory(memory.total, memory.available, swap.total, memory.available + swap.free)


def parse_meminfo(text: str) -> Memory:
    """From Linux' /proc/meminfo, whose numbers are KiB."""
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())}
    size = {name: int(words[0]) << 10 for name, words in fields.items() if words and words[0].isdigit()}
    available, swap_free = size.get("MemAvailable", size.get("MemFree", 0)), size.get("SwapFree", 0)
    return Memory(size.get("MemTotal", 0), available, size.get("SwapTotal", 0), available + swap_free)


def _windows() -> Memory:
    import ctypes

    class Status(ctypes.Structure):  # MEMORYSTATUSEX; "page file" in it means RAM and page file together
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "commit_limit", "commit_left", "virtual", "virtual_left", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return Memory(0, 0, 0, 0)
    page_file = max(0, status.commit_limit - status.total)
    return Memory(status.total, status.available, page_file, status.commit_left)

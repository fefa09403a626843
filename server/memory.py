"""How much memory this machine has and has left, without any package."""

from __future__ import annotations

import os
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
    """Raises nothing."""
    if sys.platform == "win32":
        return _windows()
    try:
        return parse_meminfo(_MEMINFO.read_text(encoding="ascii", errors="replace"))
    except OSError:  # macOS, or a container without /proc
        return _unix()


def _unix() -> Memory:
    try:
        import psutil

        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return Memory(memory.total, memory.available, swap.total, memory.available + swap.free)
    except Exception:  # it is not installed, or reads /proc itself
        total, available = (_pages(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        return Memory(total, available, 0, available)


def _pages(name: str) -> int:
    try:
        return max(0, os.sysconf(name)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # a name that this system does not know
        return 0


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

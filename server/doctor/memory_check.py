"""RAM and page file."""

from __future__ import annotations

import sys

from server.doctor.result import Complaint, Result, conclude, gib, warning
from server.footprint import GiB
from server.memory import Memory
from server.profiles import Note

SMALL = 6 * GiB  # profiles.py's tier for CPUs
PAGE_FILE = ("系统设置 > 关于 > 高级系统设置 > 性能 > 高级 > 虚拟内存：选“自动管理”，然后重启",
             "Settings > About > Advanced system settings > Performance > Advanced > Virtual memory: let Windows "
             "manage it, then restart")  # fmt: skip


def judge_memory(memory: Memory, system: str = sys.platform) -> Result:
    windows = system == "win32"
    name = ("页面文件", "page file") if windows else ("交换区", "swap")
    said = Note(f"空闲 {gib(memory.available)}，共 {gib(memory.total)}；{name[0]} {gib(memory.page_file)}，"
                f"还能申请 {gib(memory.reservable)}",
                f"{gib(memory.available)} of {gib(memory.total)} are free; {name[1]} {gib(memory.page_file)}, programs "
                f"may ask for {gib(memory.reservable)}")
    complaints: list[Complaint] = []
    if not memory.total:
        unknown = warning("系统没有说有多少内存", "the system does not say how much there is",
                          do=("在 Linux 上检查 /proc 有没有挂载", "on Linux see whether /proc is mounted"))
        return conclude(None, [unknown], facts=memory._asdict())
    if memory.total < SMALL:
        complaints.append(warning("比 6 GiB 少，6B 的模型没有显卡跑不起来",
                                  "less than 6 GiB: too little for a 6B model without a GPU",
                                  do=("加内存，或用 --model demo 试小模型",
                                      "add memory, or try the small model with --model demo")))
    if windows and memory.page_file < GiB and memory.total < 32 * GiB:
        complaints.append(warning("页面文件关了或太小，加载时可能报错 1455",
                                  "the page file is off or small: loading may fail with error 1455", do=PAGE_FILE))
    return conclude(said, complaints, facts=memory._asdict())

"""The memory that there is, which launch profile would be chosen for it, and what that takes."""

from __future__ import annotations

import sys
from dataclasses import replace

from server.doctor.result import Complaint, Result, State, conclude, gib, joined, problem, warning
from server.footprint import GiB
from server.hardware import Hardware
from server.memory import Memory
from server.profiles import LaunchProfile, Note

SMALL = 6 * GiB  # profiles.py's tier for CPUs
PAGE_FILE = ("设置 > 系统 > 关于 > 高级系统设置 > 性能 > 高级 > 虚拟内存：选“自动管理”，然后重启",
             "Settings > System > About > Advanced system settings > Performance > Advanced > Virtual memory: let "
             "Windows manage it, then restart")  # fmt: skip
FREE = ("关掉别的程序，或用 --profile small、--model demo、较小的 --max-length",
        "close other programs, or use --profile small, --model demo or a smaller --max-length")  # fmt: skip


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


def judge_profile(profile: LaunchProfile) -> Result:
    bits = ("不量化", "not quantized") if profile.bits == 16 else (f"int{profile.bits}", f"int{profile.bits}")
    slots, length = profile.slots, profile.max_length
    # the reason first, for a narrow window cuts the end
    said = Note(f"{profile.reason.zh}，所以用 {profile.name} 档（{bits[0]}，{profile.dtype}，{profile.device}，"
                f"{slots} 个请求 x {length} token）",
                f"{profile.reason.en}, so it is {profile.name} ({bits[1]}, {profile.dtype}, {profile.device}, "
                f"{slots} requests x {length} tokens)")
    facts = {
        "name": profile.name,
        "bits": profile.bits,
        "device": profile.device,
        "dtype": profile.dtype,
        "max_length": profile.max_length,
        "slots": profile.slots,
        "kept": profile.kept,
        "threads": profile.threads,
        "kernels": profile.kernels,
        "reason": profile.reason._asdict(),
        "warnings": [note._asdict() for note in profile.warnings],
    }
    complaints = [warning(note.zh, note.en, do=None) for note in profile.warnings]
    return conclude(said, complaints, facts=facts)


def beside_itself(found: Result) -> Result:
    """The same while this program runs: what it holds itself seems to be lacking."""
    if found.state is State.OK:
        return found
    running = Note("本程序正在运行，它占的内存和显存也算在内：先关掉它，再诊断一次",
                   "this program is running, and what it holds counts as taken: stop it, then run the doctor again")
    return replace(found, state=State.WARNING, advice=joined([running, *filter(None, [found.advice])]))


def judge_needs(profile: LaunchProfile, weights: int, hardware: Hardware, memory: Memory) -> Result:
    """``weights``: bytes of the profile's weights alone; the rest is the cache of conversations and what computes."""
    on_gpu = profile.device != "cpu"
    free = memory.available
    if on_gpu:
        free = next(gpu.free for gpu in hardware.gpus if profile.device == f"cuda:{gpu.index}")
    where = ("显存", "GPU memory") if on_gpu else ("内存", "memory")
    said = Note(f"约需{where[0]} {gib(profile.needs)}（其中权重 {gib(weights)}），空闲 {gib(free)}",
                f"about {gib(profile.needs)} of {where[1]} ({gib(weights)} for the weights), {gib(free)} is free")
    complaints: list[Complaint] = []
    if profile.needs > free:
        complaints.append(problem("不够", "too little", do=FREE))
    if not on_gpu and memory.reservable and profile.needs > memory.reservable:
        complaints.append(warning("超过系统还能分配的（页面文件太小）",
                                  "more than the system can still give out (the page file is too small)", do=FREE))
    return conclude(said, complaints, facts={"needs": profile.needs, "weights": weights, "free": free})

"""How to run a model on this machine: bits, device, lengths. Pure functions of what was found and what was asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from server.config import Config
from server.errors import StartupError
from server.footprint import GiB, ModelShape
from server.hardware import GPU, Hardware

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A model this small (the demo) answers sooner on the CPU than CUDA takes to start.
TINY_BYTES = 200 * 10**6
# Oldest GPUs (compute capability) that PyTorch's builds for CUDA 12 and 13 have kernels for.
OLDEST_GPU = {"12": (5, 0), "13": (7, 5)}
# On the CPU in the order of speed: the kernels read 4 bits in the quarter of the time of 16; without them torch
# computes with 16-bit weights directly and unpacks the others at every use.
KERNEL_BITS = (4,)
TORCH_BITS = (16, 8, 4)
MAX_LENGTH = 4096  # tokens; what docile-chatty asks for, twice my-chatglm2's limit
# Finished conversations are kept in at most half of the memory that is left, for what is needed is an estimate and
# other programs need some too; unless --keep says otherwise so many, in so many bytes.
KEPT = 16
KEPT_BYTES = 2 * GiB


class Tier(NamedTuple):
    """A row of the table: ``memory`` in bytes is what the machine must have, ``slots`` the most that are given."""

    memory: int
    bits: int
    slots: int
    prefill_chunk: int


TIERS = {
    "large": Tier(13 * GiB, 16, 8, 256),
    "medium": Tier(10 * GiB, 8, 8, 256),
    "small": Tier(6 * GiB, 4, 4, 128),
    "cpu": Tier(6 * GiB, 4, 8, 256),  # the bits are the last resort: as above, as memory allows
}
GPU_TIERS = ("large", "medium", "small")  # best first


class Note(NamedTuple):
    """A sentence in both languages."""

    zh: str
    en: str


@dataclass(frozen=True)
class LaunchProfile:
    """Everything that the engine is started with; lengths in tokens, ``needs`` in bytes, no field open any more.

    ``kept``: slots for finished conversations, beside the ``slots`` that run. ``needs`` counts both, though on the CPU
    a slot takes its memory only when it is first used. ``reason`` says why this one, ``warnings`` what may go wrong
    with it.
    """

    name: str  # small, medium, large or cpu
    bits: int
    device: str  # cpu or cuda:N (with CUDA_DEVICE_ORDER=PCI_BUS_ID)
    dtype: str
    max_length: int
    slots: int
    kept: int
    prefill_chunk: int
    threads: int
    needs: int
    kernels: bool  # whether the CPU kernels compute it
    reason: Note
    warnings: tuple[Note, ...]


_AGAIN = Note("删掉 .venv 再启动会重装", "delete .venv and start again")
if os.name == "nt":
    _AGAIN = Note("运行 setup_offline.bat 重装", "run setup_offline.bat")
_NO_COMPILER = Note("没有 C 编译器，CPU 内核用不了，回答会慢很多：请安装一个（例如 pip install ziglang）后再启动",
                    "without a C compiler the CPU kernels cannot be used and answers are slow: install one "
                    "(pip install ziglang, say) and start again")


def choose(hardware: Hardware, shape: ModelShape, config: Config) -> LaunchProfile:
    """The profile that the user asked for, or the best that fits into what is free now.

    What was named explicitly is done even where it does not fit, with a warning. Raises StartupError if nothing fits,
    or for a device that is not there.
    """
    _check(shape, config)
    profile = _choose(hardware, shape, config)
    most = max(hardware.cores, hardware.threads)
    if profile.threads <= most:
        return profile
    note = Note(f"--threads {profile.threads} 超过这台机器的 {most} 个，改用 {most} 个",
                f"--threads {profile.threads} is more than this machine has; {most} are used")
    return replace(profile, threads=most, warnings=(*profile.warnings, note))


def _choose(hardware: Hardware, shape: ModelShape, config: Config) -> LaunchProfile:
    if _is_tiny(shape, config):
        exact = replace(config, dtype="float32") if config.dtype == "auto" else config
        reason = Note("模型很小，用 CPU 最快", "the model is small, the CPU is quickest")
        return replace(_profile("cpu", "cpu", 16, shape, hardware, exact, hardware.ram_available), reason=reason)
    gpu, warnings = _find_gpu(hardware, config)
    if gpu is None:
        return _on_cpu(hardware, shape, config, warnings)
    return _on_gpu(gpu, hardware, shape, config, warnings)


def _check(shape: ModelShape, config: Config) -> None:
    if config.profile == "cpu" and config.device.startswith("cuda"):
        raise StartupError(f"--profile cpu 和 --device {config.device} 矛盾：请去掉一个。",
                           f"--profile cpu contradicts --device {config.device}: leave one out.", param="device")
    if config.max_length and config.max_length > shape.seq_length:
        raise StartupError(f"--max-length {config.max_length} 太长：这个模型最多 {shape.seq_length} 个 token。",
                           f"--max-length {config.max_length} is too long: this model knows {shape.seq_length} tokens.",
                           param="max_length")
    if shape.stored_bits < 16 and config.quantize not in (None, shape.stored_bits):
        raise StartupError(f"这个模型文件已经是 {shape.stored_bits} 位的，不能用 -q {config.quantize}：请去掉 -q。",
                           f"This model is stored in {shape.stored_bits} bits, -q {config.quantize} is not possible: "
                           "leave -q out.", param="quantize")


def _is_tiny(shape: ModelShape, config: Config) -> bool:
    asked = config.device.startswith("cuda") or config.quantize in (4, 8) or config.profile not in ("auto", "cpu")
    return not asked and shape.weight_bytes(16, 2) < TINY_BYTES


def _find_gpu(hardware: Hardware, config: Config) -> tuple[GPU | None, tuple[Note, ...]]:
    """The GPU to use, or None; with it the reasons why one that is there, or was asked for, is not used."""
    if config.device == "cpu" or config.profile == "cpu":
        return None, ()
    problem = _gpu_problem(hardware)
    if problem and config.device.startswith("cuda"):
        raise StartupError(f"用不了 --device {config.device}：{problem.zh}。",
                           f"--device {config.device} is not possible: {problem.en}.", param="device")
    if problem:
        worth_saying = hardware.gpus or config.profile != "auto"
        note = Note(f"{problem.zh}，改用 CPU", f"{problem.en}; the CPU is used")
        return None, (note,) if worth_saying else ()
    usable = [gpu for gpu in hardware.gpus if _has_kernels(gpu, hardware.torch_cuda)]
    if ":" not in config.device:
        return max(usable, key=lambda gpu: gpu.free), ()
    wanted, *others = map(int, config.device.split(":")[1].split(","))
    only = Note(f"只用一块显卡：cuda:{wanted}", f"only one GPU is used: cuda:{wanted}")
    for gpu in usable:
        if gpu.index == wanted:
            return gpu, (only,) if others else ()
    there = ", ".join(f"cuda:{gpu.index}" for gpu in usable)
    raise StartupError(f"没有可用的 cuda:{wanted}：这台机器有 {there}。",
                       f"There is no usable cuda:{wanted}: this machine has {there}.", param="device")


def _gpu_problem(hardware: Hardware) -> Note | None:
    if not hardware.gpus:
        return Note("没有找到 NVIDIA 显卡（或它的驱动）", "no NVIDIA GPU (or no driver for it) was found")
    if hardware.torch_cuda is None:
        return Note(f"找到了显卡，但装的是 CPU 版 PyTorch（{_AGAIN.zh}）",
                    f"there is a GPU, but PyTorch was installed for the CPU ({_AGAIN.en})")
    if not any(_has_kernels(gpu, hardware.torch_cuda) for gpu in hardware.gpus):
        return Note(f"{hardware.gpus[0].name} 太旧，PyTorch（CUDA {hardware.torch_cuda}）不支持",
                    f"{hardware.gpus[0].name} is too old for PyTorch with CUDA {hardware.torch_cuda}")
    return None


def _has_kernels(gpu: GPU, torch_cuda: str) -> bool:
    return gpu.capability is None or gpu.capability >= OLDEST_GPU.get(torch_cuda.split(".")[0], (0, 0))


def _on_gpu(
    gpu: GPU, hardware: Hardware, shape: ModelShape, config: Config, warnings: tuple[Note, ...]
) -> LaunchProfile:
    free = Note(f"{gpu.name} 空闲显存 {_gib(gpu.free)}", f"{gpu.name} has {_gib(gpu.free)} free")
    bits = config.quantize or (shape.stored_bits if shape.stored_bits < 16 else None)
    if config.profile != "auto":
        names = [config.profile]
    else:
        names = [name for name in GPU_TIERS if bits in (None, TIERS[name].bits)]
    device = f"cuda:{gpu.index}"
    for name in names:
        profile = _profile(name, device, bits or TIERS[name].bits, shape, hardware, config, gpu.free)
        roomy = config.slots or profile.slots * 2 >= TIERS[name].slots  # else the next tier serves more at once
        if profile.needs <= gpu.free and (roomy or name == names[-1]):
            return _with(profile, free, warnings)
    if config.profile == "auto" and config.device == "auto" and not config.quantize:
        short = Note(f"{free.zh}，{profile.bits} 位也要 {_gib(profile.needs)}，改用 CPU",
                     f"{free.en}, {profile.bits} bits need {_gib(profile.needs)}; the CPU is used")
        return _on_cpu(hardware, shape, config, (*warnings, short))
    return _with(profile, free, (*warnings, _too_big(profile, "显存", "GPU memory", gpu.free)))


def _on_cpu(hardware: Hardware, shape: ModelShape, config: Config, warnings: tuple[Note, ...]) -> LaunchProfile:
    free = Note(f"空闲内存 {_gib(hardware.ram_available)}", f"{_gib(hardware.ram_available)} of memory is free")
    asked = config.quantize or (TIERS[config.profile].bits if config.profile in GPU_TIERS else None)
    stored = shape.stored_bits if shape.stored_bits < 16 else None
    if not hardware.kernels and asked != 16:
        warnings = (*warnings, _NO_COMPILER)
    order = KERNEL_BITS if hardware.kernels else TORCH_BITS
    for bits in (stored or asked,) if stored or asked else order:
        profile = _profile("cpu", "cpu", bits, shape, hardware, config, hardware.ram_available)
        if profile.needs <= hardware.ram_available:
            return _with(profile, free, warnings)
    if asked:
        return _with(profile, free, (*warnings, _too_big(profile, "内存", "memory", hardware.ram_available)))
    said = [*warnings, Note(f"{free.zh}，{profile.bits} 位也要 {_gib(profile.needs)}",
                            f"{free.en}, {profile.bits} bits need {_gib(profile.needs)}")]
    zh, en = "；".join(note.zh for note in said), "; ".join(note.en for note in said)
    raise StartupError(f"内存不够：{zh}。请关掉别的程序，或用 --model demo 试小模型。",
                       f"Not enough memory: {en}. Close other programs, or try the small model with --model demo.")


def _profile(
    name: str, device: str, bits: int, shape: ModelShape, hardware: Hardware, config: Config, available: int
) -> LaunchProfile:
    """A row of the table with the user's values put in and as many of its slots as fit into ``available`` bytes."""
    row = TIERS[name]
    on_kernels = device == "cpu" and bits < 16 and hardware.kernels and config.dtype in ("auto", "float32")
    dtype = "float16" if device != "cpu" else "float32" if on_kernels else "bfloat16"
    dtype = dtype if config.dtype == "auto" else config.dtype
    max_length = config.max_length or min(MAX_LENGTH, shape.seq_length)
    chunk = config.prefill_chunk or row.prefill_chunk

    def needs(slots: int) -> int:
        return shape.full_house(
            bits=bits,
            item=ITEM_BYTES[dtype],
            gpu=device != "cpu",
            kernels=on_kernels,
            slots=slots,
            max_length=max_length,
            chunk=chunk,
        )

    slots = config.slots or next((n for n in range(row.slots, 1, -1) if needs(n) <= available), 1)
    kept = _kept(config.keep, needs(slots + 1) - needs(slots), available - needs(slots)) if shape.causal_prompt else 0
    threads = config.threads or hardware.cores
    return LaunchProfile(
        name=name,
        bits=bits,
        device=device,
        dtype=dtype,
        max_length=max_length,
        slots=slots,
        kept=kept,
        prefill_chunk=chunk,
        threads=threads,
        needs=needs(slots + kept),
        kernels=on_kernels,
        reason=Note("", ""),
        warnings=(),
    )


def _kept(asked: int | None, slot: int, left: int) -> int:
    """How many slots of ``slot`` bytes hold finished conversations, where ``left`` bytes stay free without them."""
    most, budget = (KEPT, KEPT_BYTES) if asked is None else (asked, left)
    return max(0, min(most, min(budget, left // 2) // slot))


def _with(profile: LaunchProfile, reason: Note, warnings: tuple[Note, ...]) -> LaunchProfile:
    return replace(profile, reason=reason, warnings=warnings)


def _too_big(profile: LaunchProfile, zh: str, en: str, free: int) -> Note:
    return Note(f"可能不够：{profile.bits} 位约要 {_gib(profile.needs)}，空闲{zh}只有 {_gib(free)}",
                f"may not fit: {profile.bits} bits need about {_gib(profile.needs)}, {_gib(free)} of {en} is free")


def _gib(size: int) -> str:
    return f"{size / GiB:.1f} GiB"

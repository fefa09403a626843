"""Models whose original weights were deleted: how they run, and when the originals are needed again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from server.config import Config
from server.converted import kept
from server.download.folder import repositories
from server.errors import ModelError, StartupError
from server.footprint import ModelShape
from server.hardware import Hardware
from server.profiles import LaunchProfile, Note, choose


def choose_for(folder: Path, hardware: Hardware, shape: ModelShape, config: Config) -> LaunchProfile:
    """``choose``; where the user left it open, as what was kept of the model can run. Raises as ``choose``."""
    profile, bits = choose(hardware, shape, config), kept(folder)
    if not bits or _serves(profile, bits, config) or not _is_open(config):
        return profile
    other = choose(hardware, shape, replace(config, device="cpu", quantize=max(bits)))
    if not other.kernels:
        return profile
    note = Note(f"原来的权重已经用 --prune 删掉，只留下了 CPU 用的 int{other.bits}，所以这样运行；"
                f"要按 {profile.name} 档位运行，请加 --profile {profile.name}，会重新下载",
                f"the original weights were deleted with --prune, what was kept is int{other.bits} for the CPU, so "
                f"that is what runs; --profile {profile.name} downloads them again")  # fmt: skip
    return replace(other, warnings=(*other.warnings, note))


def wants_originals(folder: Path, hardware: Hardware, config: Config) -> bool:
    """Whether what was kept of the model cannot do what the user asked for."""
    bits = kept(folder)
    try:
        return bool(bits) and not _serves(
            choose_for(folder, hardware, ModelShape.from_folder(folder), config), bits, config
        )
    except StartupError:
        return False  # nothing of it would run


def check_can_be_had(folder: Path, root: Path, *, anywhere: bool) -> None:
    """Raises ModelError where the originals are wanted and are the user's own."""
    if repositories(folder, root, anywhere=anywhere):
        return
    bits = " / ".join(f"-q {bits}" for bits in kept(folder))
    raise ModelError(
        f"{folder} 里原来的权重已经用 --prune 删掉，留下的只能用 CPU 按 {bits} 运行，也不能加 LoRA："
        "请照此启动，或把原来的权重放回来。",
        f"The original weights in {folder} were deleted with --prune, what was kept runs only on the CPU with {bits}, "
        "and without a LoRA: start that way, or put the originals back.",
        param="model",
    )


def _serves(profile: LaunchProfile, bits: Collection[int], config: Config) -> bool:
    return profile.kernels and profile.bits in bits and config.lora is None


def _is_open(config: Config) -> bool:
    """Whether the user asked for nothing that what was kept could not do."""
    return (
        config.quantize is None
        and config.lora is None
        and config.profile in ("auto", "cpu")
        and config.device in ("auto", "cpu")
        and config.dtype in ("auto", "float32")
    )

"""From options to a running engine: the same for every command that answers questions in this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from server.adapters import check_adapters, check_model, with_prefix
from server.config import ROOT, Config
from server.core import Engine
from server.download import SENTENCE, Origin, ensure_edition, ensure_model
from server.download.folder import DEFAULT_MODEL, locate
from server.download.pruned import choose_for
from server.errors import StartupError
from server.hardware import probe
from server.models.generations import AUTO, TITLES, Told, check_folder, tell_folder
from server.profiles import LaunchProfile, ModelShape

if TYPE_CHECKING:
    from server.engine.embedder import Embedder
    from server.kernels.ops import Ops


def prepare(config: Config) -> tuple[Path, LaunchProfile]:
    """The model's folder, downloaded if it is missing, and how to run it on this machine."""
    check_adapters(config)
    given = locate(config.model or DEFAULT_MODEL, ROOT)
    check_folder(given, config.family)  # before asking for files that such a model has not
    check_model(given)
    folder = ensure_edition(config)
    return folder, choose_for(
        folder, probe(ROOT), with_prefix(ModelShape.from_folder(folder), config.ptuning), config
    )


def build_engine(
    config: Config, folder: Path, profile: LaunchProfile, embedder: Embedder | None = None
) -> Engine:
    """Load the model as the profile says, with a progress bar if it is a large one; torch is imported only now."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which the probe numbered the GPUs
    import torch

    from server.engine.local import EngineSettings, LocalEngine
    from server.engine.speculation import row_cost
    from server.kernels.cpu_ops import CpuOps
    from server.models.loader import load_model

    torch.set_num_threads(profile.threads)
    ops = build_ops(config, profile)
    with progress_bar(config, "正在加载模型", "loading the model") as progress:
        model = load_model(
            folder,
            dtype=getattr(torch, profile.dtype),
            device=profile.device,
            bits=profile.bits,
            ops=ops,
            family=config.family,
            progress=progress,
            ptuning=config.ptuning,
            lora=config.lora,
        )
    if isinstance(ops, CpuOps):
        torch.set_num_threads(1)  # the kernels have threads of their own, which torch's would get in the way of
    settings = EngineSettings(
        profile.max_length,
        profile.slots,
        config.queue,
        profile.prefill_chunk,
        config.speculate,
        row_cost(ops.name),
        profile.kept,
    )
    return LocalEngine(model, settings, embedder)


def build_ops(config: Config, profile: LaunchProfile) -> Ops:
    """What computes; says so where the CPU kernels were meant and cannot be had."""
    from server.kernels.build import NoKernels
    from server.kernels.cpu_ops import CpuOps
    from server.kernels.torch_ops import TorchOps

    if profile.kernels:
        try:
            return CpuOps(profile.threads)
        except NoKernels as error:
            speaker(config)(
                f"注意：CPU 内核没有编译成功（{error}），改用 PyTorch，会慢几十倍：请安装 C 编译器"
                "（例如 pip install ziglang）后再启动。",
                f"note: the CPU kernels could not be compiled ({error}); PyTorch computes instead, dozens of times "
                "slower: install a C compiler (pip install ziglang, say) and start again.",
            )
    return TorchOps()


def build_embedder(config: Config, threads: int) -> Embedder:
    """Uses half of the CPU ``threads``. Looks for no model yet; that is done on first use."""
    from server.engine.embedder import Embedder

    def find() -> Path:
        origin = Origin(config.source, config.endpoint)
        folder = ensure_model(config.embedding_model, SENTENCE, origin=origin, language=config.language)
        _check_memory(folder)
        return folder

    name = locate(config.embedding_model, ROOT, SENTENCE).resolve().name
    return Embedder(name, find, threads=max(1, threads // 2))


def _check_memory(folder: Path) -> None:
    """Refuse a sentence model that is too large: the system would end the whole program, chats and all."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    needed, free = sum(file.stat().st_size for file in files), probe(ROOT).ram_available
    if needed > free:
        size, left = f"{needed / 2**30:.1f} GiB", f"{free / 2**30:.1f} GiB"
        raise StartupError(
            f"内存不够：{folder} 要 {size}，只剩 {left}。请关掉别的程序。",
            f"Not enough memory: {folder} takes {size}, {left} is free. Close other programs.",
        )


@contextlib.contextmanager
def progress_bar(config: Config, zh: str, en: str):
    """A callback (done, total) in bytes that draws a bar on a terminal once the work has taken more than a second."""
    from tqdm import tqdm

    label = zh if config.language == "zh" else en
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=label, delay=1, leave=False, disable=None) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def speaker(config: Config) -> Callable[[str, str], None]:
    """Prints one of two sentences, by the user's language."""
    return lambda zh, en: print(zh if config.language == "zh" else en, flush=True)


def print_choice(say: Callable[[str, str], None], config: Config, folder: Path, profile: LaunchProfile) -> None:
    """Which model runs, and how."""
    needs, length = f"{profile.needs / 2**30:.1f} GiB", profile.max_length
    _print_model(say, config, folder)
    zh, en = ("不量化", "not quantized") if profile.bits == 16 else (f"int{profile.bits}", f"int{profile.bits}")
    say(
        f"档位：{profile.name}（{zh}，{profile.dtype}，设备 {profile.device}，约需内存 {needs}），"
        f"因为{profile.reason.zh}",
        f"profile: {profile.name} ({en}, {profile.dtype}, on {profile.device}, needs about {needs}): "
        f"{profile.reason.en}",
    )
    say(
        f"同时回答的请求数：{profile.slots}，每个最多 {length} token；另保留对话：{profile.kept} 段；"
        f"CPU 线程数：{profile.threads}",
        f"requests at once: {profile.slots}, of at most {length} tokens each; conversations kept besides: "
        f"{profile.kept}; CPU threads: {profile.threads}",
    )
    print_warnings(say, profile)


def _print_model(say: Callable[[str, str], None], config: Config, folder: Path) -> None:
    """The model's folder and generation, and what was trained beside it."""
    told = tell_folder(folder) if config.family == AUTO else Told(config.family)
    title = TITLES[told.family]
    say(f"模型：{folder}（{title}）", f"model: {folder} ({title})")
    if told.guessed:
        say(f"注意：模型文件夹里没有说明是哪一代，按 {title} 运行；如果是另一代，请用 --family 指明",
            f"note: nothing in the model's folder says which generation it is of, so it runs as {title}; if it is "
            "another one, name that with --family")
    own = 0 if config.ptuning else ModelShape.from_folder(folder).prefix
    if own:
        say(f"P-Tuning：模型自带的前缀，{own} 个 token", f"P-Tuning: the model's own prefix of {own} tokens")
    for name, adapter in (("P-Tuning", config.ptuning), ("LoRA", config.lora)):
        if adapter:
            say(f"{name}：{adapter}", f"{name}: {adapter}")


def print_warnings(say: Callable[[str, str], None], profile: LaunchProfile) -> None:
    """What the user may not expect of the profile."""
    for warning in profile.warnings:
        say(f"注意：{warning.zh}", f"note: {warning.en}")

"""From an official checkpoint folder to a network that is ready to compute."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.converted import NoRoom, kept, replacement, whole_file
from server.converting import NotConvertible, Sources
from server.errors import ModelError
from server.file_lock import folder_lock
from server.kernels.cpu_ops import CpuOps
from server.kernels.ops import Ops
from server.models.base import Family, Network, Tokenizer
from server.models.checkpoint import read_tensors, weight_files
from server.models.convert import convert, convert_once
from server.models.families import AUTO, find_family
from server.models.files import read_json
from server.models.filler import Filler
from server.models.lora import read_lora
from server.models.prefix import Prefix, build_prefix, read_prefix
from server.quant.cache import NetworkCache, OfAnotherConfig, Unusable

log = logging.getLogger(__name__)

CACHED_FROM = 10**9  # bytes of weight files: less is quantized in a moment
Progress = Callable[[int, int], None]  # bytes of the weight files read so far, and in all


@dataclass(frozen=True)
class LoadedModel:
    """What the engine needs of a model. ``prefix`` is a P-tuning prefix for the KV cache, or None."""

    name: str
    family: Family
    config: Mapping[str, Any]
    network: Network
    tokenizer: Tokenizer
    prefix: Prefix | None
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype  # of keys and values


def load_model(folder: str | Path, *, family: str = AUTO, **how: Any) -> LoadedModel:
    """Read an unchanged official checkpoint folder; ``how`` is what ``load_network`` takes.

    Raises ModelError naming the file, field or tensor at fault.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    found = find_family(config, folder, family)
    tokenizer = found.load_tokenizer(folder)
    network, tuned = load_network(folder, config, found, **how)
    if tokenizer.vocab_size > network.vocab_size:
        raise ModelError(
            f"{folder} 的分词器有 {tokenizer.vocab_size} 个词，模型只有 {network.vocab_size} 个；"
            f"{found.tokenizer_file} 和权重不是同一个模型的。",
            f"The tokenizer in {folder} has {tokenizer.vocab_size} ids and the network {network.vocab_size}: "
            f"{found.tokenizer_file} and weights belong to different models.",
        )
    name, dtype, device = folder.resolve().name, how["dtype"], torch.device(how["device"])
    return LoadedModel(name, found, config, network, tokenizer, tuned, dtype, device, _kv_dtype(dtype, how["ops"]))


def _kv_dtype(dtype: torch.dtype, ops: Ops) -> torch.dtype:
    return ops.storage or dtype if dtype == torch.float32 else dtype


def load_network(
    folder: Path,
    config: Mapping[str, Any],
    family: Family,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    bits: int = 16,
    ops: Ops,
    progress: Progress | None = None,
    ptuning: Path | None = None,
    lora: Path | None = None,
    must_keep: bool = False,
) -> tuple[Network, Prefix | None]:
    """The network alone, and the P-tuning prefix for its KV cache.

    ``dtype`` is what is computed in; ``bits`` 8 or 4 quantizes every linear layer while it is read. An official
    quantized checkpoint of at most ``bits`` bits keeps its codes, and the layers that it leaves in 16 bits stay so.

    ``ptuning`` is the folder of a P-tuning v2 checkpoint, whose prefix replaces one that the model itself holds.
    ``lora`` is the folder of a PEFT adapter, merged in float32 before anything is cast or quantized; a matrix that
    comes with official codes is unpacked for it, and packed again group by group in as many bits.
    ``must_keep``: the caller is after the quantized file and holds the folder's lock; raises NoRoom, NotConvertible and
    OSError where it cannot be written, else that costs a line in the log.

    Peak memory is the finished model, one tensor, and the adapter. Raises ModelError.
    """
    network = family.build_network(config, ops)
    # what is wrong with an adapter is found before gigabytes are read
    prefix = _tuned(network, config, ptuning) if ptuning else None
    adapter = read_lora(lora, network) if lora else None
    cache = quantized_cache(folder, config, bits, ops) if not adapter else None
    own_prefix = _load_cached(cache, network, ops) if cache else None
    if own_prefix is None:
        filler = Filler(network, config, dtype=dtype, device=torch.device(device), bits=bits, ops=ops, lora=adapter)
        _fill_network(filler, network, folder, cache, progress, must_keep=must_keep)
        own_prefix = filler.prefix
    if not prefix and (own_prefix or config.get("pre_seq_len")):
        projected = bool(config.get("prefix_projection"))
        prefix = build_prefix(own_prefix, network.kv_shape, folder, projected=projected)
    if adapter:
        log.info("LoRA: %s", adapter)
    return network.eval(), prefix and tuple(part.to(device, _kv_dtype(dtype, ops)) for part in prefix)


def convert_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    bits: int,
    ops: Ops,
    family: str = AUTO,
    adapted: bool = False,
    progress: Progress | None = None,
) -> Path | None:
    """The converted file that a start with these settings reads, made if need be; ``adapted``: with a LoRA.

    None where it reads safetensors that were not made here. Within the folder's lock. Raises NoRoom, OSError,
    NotConvertible and ModelError.
    """
    config = read_json(folder / "config.json")
    found = find_family(config, folder, family)
    if cache := quantized_cache(folder, config, bits, ops) if not adapted else None:
        how = {"dtype": dtype, "device": "cpu", "bits": bits, "ops": ops, "progress": progress}
        load_network(folder, config, found, **how, must_keep=True)
        return cache.path
    if replacement(folder):
        return whole_file(folder)
    files = weight_files(folder)
    return convert(folder, files, progress=progress) if files[0].suffix == ".bin" else None


def _fill_network(
    filler: Filler,
    network: Network,
    folder: Path,
    cache: NetworkCache | None,
    progress: Progress | None,
    *,
    must_keep: bool,
) -> None:
    """From the original weights, or what they were converted to; keeps what was quantized."""
    files = cache.files if cache else convert_once(folder, weight_files(folder), CACHED_FROM, progress)
    with Sources(files) if cache else contextlib.nullcontext() as sources:
        _fill(filler, files, progress)
        filler.finish(folder)
        if must_keep:
            cache.save(network, filler.prefix, sources)
        elif cache:
            _save(cache, network, filler.prefix, sources, folder)


def _fill(filler: Filler, files: Sequence[Path], progress: Progress | None) -> None:
    total = sum(path.stat().st_size for path in files)
    done = 0
    for path in files:
        for name, tensor in read_tensors(path):
            filler.add(name, tensor, path)
            done += tensor.nbytes
            if progress:
                progress(min(done, total), total)


def quantized_cache(folder: Path, config: Mapping[str, Any], bits: int, ops: Ops) -> NetworkCache | None:
    """None where quantizing again takes no time, or the codes lie otherwise: another back end's, an embedding's."""
    if not isinstance(ops, CpuOps) or config.get("quantization_embeddings"):
        return None
    stored_bits = config.get("quantization_bit")
    if file := kept(folder).get(bits):
        there = [path for path in file.originals if path.exists()]
        return NetworkCache(folder, bits, there, stored_bits=stored_bits, alone=True)
    files = weight_files(folder)
    large = sum(path.stat().st_size for path in files) >= CACHED_FROM
    return NetworkCache(folder, bits, files, stored_bits=stored_bits) if large else None


def _load_cached(cache: NetworkCache, network: Network, ops: CpuOps) -> Mapping[str, torch.Tensor] | None:
    """The network filled, and the tensors that are not its own; None where it has to be made of the originals."""
    try:
        return cache.load(network, ops)
    except Unusable as reason:
        if not cache.alone:
            log.warning("%s is %s and is made again", cache.path, reason)
            return None
        if isinstance(reason, OfAnotherConfig):
            raise ModelError(
                f"{cache.path} 和现在的 config.json 不是同一个模型的，而原来的权重已经删掉了："
                "请把 config.json 改回去。",
                f"{cache.path} and config.json are not of the same model now, and the original weights were deleted: "
                "undo what was changed in config.json.",
            ) from reason
        raise ModelError(
            f"{cache.path} 不能用（{reason}），而原来的权重已经删掉了：请删掉这个文件再启动，会重新下载"
            "（自己的模型请把原来的权重放回来）。",
            f"{cache.path} cannot be used (it is {reason}), and the original weights were deleted: delete this "
            "file and start again, which downloads them (or put those of your own model back).",
        ) from reason


def _save(
    cache: NetworkCache, network: Network, prefix: Mapping[str, torch.Tensor], sources: Sources, folder: Path
) -> None:
    """A model that cannot be kept is ready all the same; only the next start takes as long as this one."""
    try:
        with folder_lock(folder) as is_ours:
            if is_ours:
                cache.save(network, prefix, sources)
            else:
                log.info(
                    "另一个程序正在往 %s 里写，这次不保存量化后的模型。 / Another program is writing into that folder, "
                    "so the quantized model is not kept this time.", folder,
                )  # fmt: skip
    except NoRoom as error:
        log.warning(
            "量化后的模型没有保存到 %s：磁盘要 %.1f GB，只剩 %.1f GB；腾出空间后，下次启动就不用再量化。"
            " / The quantized model was not kept in that file: it takes %.1f GB on the disk and %.1f GB are free; make "
            "room, and later starts will not quantize again.",
            cache.path, error.needed / 1e9, error.free / 1e9, error.needed / 1e9, error.free / 1e9,
        )  # fmt: skip
    except (OSError, NotConvertible) as error:
        log.warning(
            "量化后的模型没有保存（%s）；照样能用，只是下次启动还要再量化。 / The quantized model was not kept (%s); "
            "all works, but the next start quantizes again.", error, error,
        )  # fmt: skip


def _tuned(network: Network, config: Mapping[str, Any], folder: Path) -> Prefix:
    """The prefix of a checkpoint of its own, whose config.json may be missing: the model's then speaks for it."""
    if (folder / "config.json").exists():
        config = {**config, **read_json(folder / "config.json")}
    projected = bool(config.get("prefix_projection"))
    prefix = build_prefix(read_prefix(folder), network.kv_shape, folder, projected=projected)
    log.info("P-tuning: %d prefix tokens, %s", prefix[0].shape[1], folder)
    return prefix

"""The weight files of a model folder, read tensor by tensor: safetensors or pytorch_model*.bin, whole or in shards."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from server.converted import Converted, is_outdated, kept
from server.converting import DTYPES
from server.errors import ModelError
from server.models.files import check_file, damaged, missing, read_json

# (a single file, the shards' index, the shards without an index); the first that is there is read
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


def weight_files(folder: Path) -> list[Path]:
    """All files that hold weights, in order; raises ModelError where there is none or a shard is missing.

    What was made here of pickles does not count where there are others now.
    """
    if bits := kept(folder):
        raise _only_quantized(folder, bits)
    for single, index, pattern in _LAYOUTS[1:] if is_outdated(folder) else _LAYOUTS:
        if (folder / single).exists():
            return [folder / single]
        if (folder / index).exists():
            return _indexed(folder / index)
        if shards := sorted(folder.glob(pattern)):
            return _numbered(shards)
    wanted = " / ".join(layout[0] for layout in _LAYOUTS)
    raise ModelError(
        f"文件夹 {folder} 里没有模型权重（{wanted} 或它们的分片）；请检查路径，或重新下载模型。",
        f"The folder {folder} holds no weights ({wanted} or their shards); check the path or download the model again.",
    )


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one file, one after the other, on the CPU and as they are stored.

    Raises ModelError for a file that is not what its name says.
    """
    check_file(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _only_quantized(folder: Path, files: Mapping[int, Converted]) -> ModelError:
    names = ", ".join(str(file.path.relative_to(folder)) for file in files.values())
    bits = " / ".join(f"-q {bits}" for bits in files)
    return ModelError(
        f"{folder} 里原来的权重已经用 --prune 删掉，只留下 {names}，它只能由 CPU 内核按 {bits} 使用，也不能加 LoRA："
        "请照此启动，或把原来的权重下载（放）回来。",
        f"The original weights in {folder} were deleted with --prune; what was kept, {names}, serves only the CPU "
        f"kernels with {bits}, and no LoRA: start that way, or download (put back) the original weights.",
    )


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise damaged(index, "里没有 weight_map", "has no weight_map")
    # a name only: an index must not lead out of its folder
    paths = [index.parent / Path(name).name for name in sorted(set(names.values()))]
    return _present(paths)


def _numbered(shards: list[Path]) -> list[Path]:
    """The shards that the names of the present ones speak of (model-00001-of-00007)."""
    match = _SHARD.search(shards[0].name)
    if not match:
        return shards
    count = int(match[2])
    names = [_SHARD.sub(f"-{i:05}-of-{count:05}.", shards[0].name) for i in range(1, count + 1)]
    return _present([shards[0].with_name(name) for name in names])


def _present(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.exists():
            raise missing(path)
    return paths


def _read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """https://huggingface.co/docs/safetensors: length of the header, header in JSON, data.

    Read with Python's own file, not mapped: then no more than one tensor is in memory besides the model, the error can
    say how much of a file is missing, and any path works on Windows.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise _truncated(path, 8 + length, size)
        try:
            entries = _entries(json.loads(file.read(length)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, "不是有效的 safetensors 文件", "is not a valid safetensors file") from error
        expected = 8 + length + max((end for *_, end in entries), default=0)
        if size < expected:
            raise _truncated(path, expected, size)
        for name, dtype, shape, begin, end in entries:
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise damaged(path, f"里 {name} 的大小不对", f"gives {name} a wrong size")
            tensor = torch.empty(shape, dtype=dtype)
            file.seek(8 + length + begin)
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
            yield name, tensor


def _entries(header: dict) -> list[tuple[str, torch.dtype, list[int], int, int]]:
    """Name, dtype, shape, begin and end of each tensor; raises ValueError and its like where it is none of these."""
    entries = []
    for name, entry in header.items():
        if name != "__metadata__":
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(name)
            entries.append((name, DTYPES[entry["dtype"]], shape, begin, end))
    return entries


def _truncated(path: Path, expected: int, size: int) -> ModelError:
    return damaged(
        path,
        f"不完整（应有 {expected} 字节，只有 {size} 字节）",
        f"is incomplete ({size} bytes of {expected})",
    )


def _read_torch(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = _load_torch(path)
    if not isinstance(tensors, dict):
        raise damaged(path, "里没有权重", "holds no weights")
    for name in list(tensors):
        tensor = tensors.pop(name)
        if isinstance(tensor, torch.Tensor):
            # a copy, so that the file is not in use (and on Windows locked) for as long as the model is
            yield name, tensor.clone()


def _load_torch(path: Path) -> object:
    """Weights only: a pickle can carry code, and this never runs any."""
    # damaged bytes lead torch to whatever exception: each of them means that the file cannot be read
    with contextlib.suppress(Exception):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        # the format of torch before 1.6 cannot be mapped, and neither can some paths on Windows
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise damaged(
            path,
            "不完整或已损坏，无法作为权重文件读取",
            "is incomplete or damaged: it cannot be read as a file of weights",
        ) from error

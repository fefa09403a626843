"""How files of converted weights are written: tensor by tensor, whole or not at all, with what they were made of."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from server.converted import SPARE_BYTES, VERSION, NoRoom, sha256, stamp, sync_folder

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_DATA = 2**20  # where the tensors begin: the header, some 60 KB for a model of 6B, is only known at the end

Tensors = Iterable[tuple[str, torch.Tensor]]


class NotConvertible(Exception):
    """The weights hold what a safetensors file cannot; says what."""


class Sources:
    """SHA-256 of the files that are converted, taken beside whoever reads them, so that the disk is read once.

    What ends its block early ends this too: a program that gives up does not wait for gigabytes.
    """

    def __init__(self, paths: Sequence[Path]):
        self._ended = threading.Event()
        self._stamps = [stamp(path) for path in paths]  # before they are read: a change under way is a change
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashes = [self._pool.submit(sha256, path, self._go_on) for path in paths]

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def described(self) -> list[dict[str, Any]]:
        """Name, size, time and SHA-256 of each, once all are hashed; raises OSError."""
        return [{**seen, "sha256": digest.result()} for seen, digest in zip(self._stamps, self._hashes, strict=True)]

    def _go_on(self, _: int) -> None:
        if self._ended.is_set():
            raise CancelledError


def write(
    target: Path,
    tensors: Tensors,
    size: int,
    sources: Sources,
    *,
    spare: int = SPARE_BYTES,
    more: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """A safetensors file of ``tensors``, some ``size`` bytes, whole or not at all; ``more`` goes into its metadata.

    Within the folder's lock and the block of ``sources``. ``advance`` is called with the bytes written so far. Takes
    memory for one tensor. Raises NoRoom, OSError, NotConvertible, and whatever ``tensors`` does.
    """
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(".converting")  # no name that anybody takes for weights, or for a download
    part.unlink(missing_ok=True)  # of what a killed program left nothing is of use, and it takes room
    free = shutil.disk_usage(target.parent).free
    if size + spare > free:
        raise NoRoom(size + spare, free)
    try:
        with part.open("wb") as file:
            _write_all(file, tensors, sources, more or {}, advance)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoRoom(size + spare, free) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    sync_folder(target.parent)


def _write_all(
    file: IO[bytes], tensors: Tensors, sources: Sources, more: Mapping[str, str], advance: Callable[[int], None]
) -> None:
    file.seek(_DATA)
    places: dict[str, Any] = {}
    sums: dict[str, str] = {}
    for name, tensor in tensors:
        _add(file, name, tensor, places, sums)
        advance(file.tell() - _DATA)
    said = {"version": VERSION, "sources": sources.described(), "sums": sums}
    metadata = {**more, **{name: json.dumps(value) for name, value in said.items()}}
    header = json.dumps({"__metadata__": metadata, **places}).encode()
    if len(header) > _DATA - 8:
        raise NotConvertible(f"{len(places)} tensors are too many")
    file.seek(0)
    file.write((_DATA - 8).to_bytes(8, "little") + header.ljust(_DATA - 8))


def _add(file: IO[bytes], name: str, tensor: torch.Tensor, places: dict[str, Any], sums: dict[str, str]) -> None:
    if name in places:
        raise NotConvertible(f"{name} is there twice")
    if tensor.dtype not in _CODES or tensor.layout != torch.strided:
        raise NotConvertible(f"{name} is {tensor.dtype}, {tensor.layout}")
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    begin = file.tell() - _DATA
    file.write(content)
    places[name] = {
        "dtype": _CODES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [begin, begin + content.nbytes],
    }
    sums[name] = xxhash.xxh3_64_hexdigest(content)

"""Pickles of weights as one safetensors file, made once: then no start unpickles gigabytes any more."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from server.converted import SPARE_BYTES, VERSION, NoRoom, sha256, stamp, sync_folder, whole_file
from server.file_lock import folder_lock
from server.models.checkpoint import DTYPES, read_tensors

log = logging.getLogger(__name__)

# left free on the disk where nobody asked for the file: a full system drive is worse than a slow start
UNASKED_SPARE_BYTES = 10 * 10**9
_DATA = 2**20  # where the tensors begin: the header, some 60 KB for a model of 6B, is only known at the end
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]


class NotConvertible(Exception):
    """The pickles hold what a safetensors file cannot, or another program is at it; says what."""


def convert_once(folder: Path, files: Sequence[Path], least: int, progress: Progress | None = None) -> list[Path]:
    """The files to read: pickles of ``least`` bytes together are converted before, or read as they are if they cannot.

    Raises ModelError for a damaged one.
    """
    size = sum(path.stat().st_size for path in files)
    if files[0].suffix != ".bin" or size < least:
        return [*files]
    target = whole_file(folder)
    log.info(
        "把 pickle 格式的权重转换成 %s（只做一次）…… / converting the pickled weights to that file, once ...", target
    )
    try:
        with folder_lock(folder) as is_ours:
            if not is_ours:
                raise NotConvertible("another program is writing into the folder")
            convert(folder, files, spare=UNASKED_SPARE_BYTES, progress=progress)
    except NoRoom as error:
        log.info(
            "没有转换权重：磁盘要有 %.1f GB，只剩 %.1f GB；照样能用，只是每次启动都要读 pickle。 / The weights "
            "were not converted: that takes %.1f GB, %.1f GB are free; all works, but every start reads the pickles.",
            error.needed / 1e9, error.free / 1e9, error.needed / 1e9, error.free / 1e9,
        )  # fmt: skip
        return [*files]
    except (OSError, NotConvertible) as error:
        log.warning("the weights were not converted, so every start reads the pickles: %s", error)
        return [*files]
    log.info(
        "转换好了；原来的 pickle 文件（%.1f GB）不再需要，可以用 download --prune 删掉。 / Converted; the pickles "
        "(%.1f GB) are not needed any more, download --prune deletes them.", size / 1e9, size / 1e9,
    )  # fmt: skip
    return [target]


def convert(
    folder: Path, files: Sequence[Path], *, spare: int = SPARE_BYTES, progress: Progress | None = None
) -> Path:
    """Write all tensors of the pickles, each in its own dtype, to model.safetensors, whole or not at all.

    Within the folder's lock. Takes memory for one tensor, and where pickles cannot be mapped for one shard. Raises
    NoRoom, OSError, NotConvertible, and ModelError for a damaged pickle.
    """
    target, size = whole_file(folder), sum(path.stat().st_size for path in files)
    path = folder / ".model.converting"  # no name that anybody takes for weights, or for a download
    try:
        with path.open("wb") as part:  # of what a killed program left nothing is of use, and it takes room
            free = shutil.disk_usage(folder).free
            if size + spare > free:
                raise NoRoom(size + spare, free)
            _write(part, files, lambda done: progress and progress(min(done, size), size))
            part.flush()
            os.fsync(part.fileno())
        os.replace(path, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoRoom(size + spare, free) from error
        raise
    finally:
        path.unlink(missing_ok=True)
    sync_folder(folder)
    return target


def _write(part: IO[bytes], files: Sequence[Path], advance: Callable[[int], None]) -> None:
    part.seek(_DATA)
    places: dict[str, Any] = {}
    sums: dict[str, str] = {}
    stamps = [stamp(path) for path in files]
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:  # beside the reading, so that the disk is read once
        hashes = [pool.submit(sha256, path) for path in files]
        try:
            for path in files:
                for name, tensor in read_tensors(path):
                    _add(part, name, tensor, places, sums)
                    advance(part.tell() - _DATA)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        sources = [{**seen, "sha256": digest.result()} for seen, digest in zip(stamps, hashes, strict=True)]
    said = {"version": VERSION, "sources": sources, "sums": sums}
    metadata = {"format": "pt", **{name: json.dumps(value) for name, value in said.items()}}
    header = json.dumps({"__metadata__": metadata, **places}).encode()
    if len(header) > _DATA - 8:
        raise NotConvertible(f"{len(places)} tensors are too many")
    part.seek(0)
    part.write((_DATA - 8).to_bytes(8, "little") + header.ljust(_DATA - 8))


def _add(part: IO[bytes], name: str, tensor: torch.Tensor, places: dict[str, Any], sums: dict[str, str]) -> None:
    if name in places:
        raise NotConvertible(f"{name} is there twice")
    if tensor.dtype not in _CODES or tensor.layout != torch.strided:
        raise NotConvertible(f"{name} is {tensor.dtype}, {tensor.layout}")
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    begin = part.tell() - _DATA
    part.write(content)
    places[name] = {
        "dtype": _CODES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [begin, begin + content.nbytes],
    }
    sums[name] = xxhash.xxh3_64_hexdigest(content)

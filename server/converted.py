"""Weights that were made of a model's original files, so that these need not stay: what is kept, and made of what.

Both kinds are safetensors files whose metadata name their sources, with a sum over the bytes of each tensor:
model.safetensors has pickles' tensors as they were, quantized/cpu-int*.safetensors what the CPU's kernels compute with.
Without any package: the doctor looks here too. https://huggingface.co/docs/safetensors describes the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.file_lock import PRIVATE

log = logging.getLogger(__name__)

VERSION = "1"  # of the quantized layout, and of what the metadata say
BITS = (4, 8)
SPARE_BYTES = 200 * 10**6  # left free on the disk
_HEADER_MOST = 100 * 2**20  # bytes, as the format's own reader allows
_BLOCK = 4 * 2**20
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin")


class NoRoom(Exception):
    """The disk is too full for the file; ``needed`` and ``free`` in bytes."""

    def __init__(self, needed: int, free: int):
        super().__init__(f"{needed} bytes are needed, {free} are free")
        self.needed = needed
        self.free = free


class Converted(NamedTuple):
    """A file of converted weights: what its header says."""

    path: Path
    places: Mapping[str, tuple[int, int]]  # tensor -> where its bytes begin and end in the file
    sources: Mapping[str, Mapping[str, Any]]  # name -> name, size, mtime_ns, sha256
    sums: Mapping[str, str]  # tensor -> xxh3_64

    @property
    def originals(self) -> list[Path]:
        """The files of weights that it was made of, there or not."""
        return [self.path_of(name) for name in self.sources if name != "config.json"]  # early files name it too

    def path_of(self, source: str) -> Path:
        return self.folder / Path(source).name  # a name only: a header must not lead out of the folder

    @property
    def folder(self) -> Path:
        """The model's."""
        return self.path.parent.parent if self.path.parent.name == "quantized" else self.path.parent


def whole_file(folder: Path) -> Path:
    """Where the tensors of pickles go: the name under which every program looks for a model's weights."""
    return folder / "model.safetensors"


def quantized_file(folder: Path, bits: int) -> Path:
    """In a folder of its own: nobody shall take it for the model's weights."""
    return folder / "quantized" / f"cpu-int{bits}.safetensors"


def read(path: Path) -> Converted | None:
    """None where there is no such file, or it is not one of ours, of another version, or cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_MOST, size - 8):
                return None
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        places = {name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
                  for name, entry in header.items()}  # fmt: skip
        said = {name: json.loads(metadata[name]) for name in ("version", "sources", "sums")}
        sources = {str(source["name"]): source for source in said["sources"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    is_whole = size == max((end for _, end in places.values()), default=0)
    return Converted(path, places, sources, said["sums"]) if is_whole and said["version"] == VERSION else None


def kept(folder: Path) -> dict[int, Converted]:
    """Number of bits -> the quantized file that stands for originals of which some are not there any more.

    Empty where all of them are there, or weights that the file was not made of: then those count.
    """
    found = {bits: read(quantized_file(folder, bits)) for bits in BITS if quantized_file(folder, bits).is_file()}
    return {bits: file for bits, file in found.items() if file and _stands_for_originals(file)}


def replacement(folder: Path) -> Converted | None:
    """model.safetensors, if it was made here of pickles and those that are there are still the same."""
    file = read(whole_file(folder))
    return file if file and not _is_outdated(file) else None


def is_outdated(folder: Path) -> bool:
    """Whether model.safetensors was made here of pickles in whose place there are others now."""
    file = read(whole_file(folder))
    return file is not None and _is_outdated(file)


def _is_outdated(file: Converted) -> bool:
    pickles = [*file.folder.glob("pytorch_model*.bin")]
    return any(path.name not in file.sources or not is_same(path, file.sources[path.name]) for path in pickles)


def _stands_for_originals(file: Converted) -> bool:
    there = {path.name: path for pattern in _WEIGHTS for path in file.folder.glob(pattern)}
    others = [path for name, path in there.items()
              if name not in file.sources or path.stat().st_size != file.sources[name].get("size")]  # fmt: skip
    return not others and any(path.name not in there for path in file.originals)


def stamp(path: Path) -> dict[str, Any]:
    """What tells a source from a changed one at a glance."""
    stat = path.stat()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def is_same(path: Path, recorded: Mapping[str, Any]) -> bool:
    """Whether a file is still what was converted; reads it only where its time is another one, and then once."""
    now = stamp(path)
    if now["size"] != recorded.get("size"):
        return False
    # a copied or touched file has another time and the same bytes
    return now["mtime_ns"] == recorded.get("mtime_ns") or _sha256_once(path, now) == recorded.get("sha256")


def _sha256_once(path: Path, now: Mapping[str, Any]) -> str:
    """Noted beside the file, for as long as it has this stamp; where nothing can be written it is hashed every time."""
    note = path.parent / PRIVATE / f"{path.name}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        noted = json.loads(note.read_bytes())
        if {**noted, **now} == noted:
            return noted["sha256"]
    log.info("核对 %s（只做一次）…… / checking that file, once", path)
    digest = sha256(path)
    with contextlib.suppress(OSError):
        note.parent.mkdir(exist_ok=True)
        note.write_text(json.dumps({**now, "sha256": digest}), encoding="utf-8")
    return digest


def sha256(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """``advance`` is called with the bytes of each step, and may raise to end it. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make sure that a file renamed into the folder is there after a power failure; Windows has no way and no need."""
    if os.name != "nt":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def has_right_sums(file: Converted, advance: Callable[[int], None] = lambda count: None) -> bool:
    """Reads all of the file; ``advance`` is called with the bytes of each step. Raises OSError."""
    import xxhash

    if file.places.keys() != file.sums.keys():
        return False
    with file.path.open("rb") as stream:
        if hasattr(os, "posix_fadvise"):  # what is on the disk counts, and not what was kept of the writing in memory
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for name, (begin, end) in file.places.items():
            stream.seek(begin)
            digest = xxhash.xxh3_64()
            while begin < end and (block := stream.read(min(_BLOCK, end - begin))):
                digest.update(block)
                advance(len(block))
                begin += len(block)
            if digest.hexdigest() != file.sums[name]:
                return False
    return True

"""Which files of a repository are wanted, and who may supply each."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from server.download.folder import ModelKind, has_pickles, is_superfluous
from server.download.manifest import Known
from server.download.probing import Supplier
from server.download.sources import Listing, RemoteFile

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_LARGE = (".bin", ".safetensors", ".model")


class Wanted(NamedTuple):
    """A file to have. Where its SHA-256 is not known, a piece of it is of no use to another source."""

    name: str
    size: int  # bytes
    sha256: str | None
    suppliers: tuple[Supplier, ...]  # the best first; nobody, where all list another file than the published one


def wanted_files(files: Sequence[RemoteFile], kind: ModelKind, *, pickles: bool = False) -> list[RemoteFile]:
    """What is worth downloading, small files first; ``pickles`` only if asked for, or if there are no safetensors."""
    patterns = ("config.json", *kind.tokenizers, *kind.extras, *WEIGHTS)
    chosen = [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
    for mark, is_wanted in ((".bin", pickles), (".safetensors", True)):
        if is_wanted and any(file.name.endswith(mark) for file in chosen):
            chosen = [file for file in chosen if mark in file.name or not _is_of_weights(file.name)]
    return sorted(chosen, key=lambda file: (is_weights(file.name), file.name))


def is_weights(name: str) -> bool:
    return name.endswith((".bin", ".safetensors"))


def _is_of_weights(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)


def is_text(name: str) -> bool:
    """Whether a file is one that people edit, and of which sources may have different versions."""
    return not name.endswith(_LARGE)


def largest(listing: Listing, kind: ModelKind) -> RemoteFile | None:
    """The file by which a source is measured."""
    return max(wanted_files(listing.files, kind), key=lambda file: file.size, default=None)


def make_plan(
    suppliers: Sequence[Supplier],
    known: Mapping[str, Known],
    kind: ModelKind,
    folder: Path,
    *,
    originals: bool = False,
) -> list[Wanted]:
    """The weights of the best supplier with any, and every other file that anybody has, as ``choose_version`` says.

    Pickles that are in the folder are gone on with, and weights left out where it is complete without them
    (``originals`` as for ``missing_files``).
    """
    pickles = has_pickles(folder)
    listings = [wanted_files(supplier.listing.files, kind, pickles=pickles) for supplier in suppliers]
    chosen = next((files for files in listings if any(is_weights(file.name) for file in files)), listings[0])
    others = [file for files in listings for file in files if not _is_of_weights(file.name)]
    names = dict.fromkeys(file.name for file in [*others, *chosen])
    wanted = [name for name in names if not is_superfluous(folder, name, originals=originals)]
    return [choose_version(name, suppliers, known.get(name)) for name in wanted]


def choose_version(name: str, suppliers: Sequence[Supplier], known: Known | None) -> Wanted:
    """The published file where it is ``known``, else what the first supplier lists; with all who list the same."""
    listed = [(supplier, file) for supplier in suppliers for file in supplier.listing.files if file.name == name]
    if known:
        listed = [(supplier, file) for supplier, file in listed
                  if file.sha256 in (None, known.sha256) and known.size in (None, file.size)]  # fmt: skip
        # where the size is open, a source that names the hash knows it better than one that names none
        listed.sort(key=lambda pair: pair[1].sha256 is None)
    if not listed:
        return Wanted(name, known.size or 0 if known else 0, known.sha256 if known else None, ())
    size = listed[0][1].size
    same = [(supplier, file) for supplier, file in listed if file.size == size]
    sha256 = known.sha256 if known else next((file.sha256 for _, file in same if file.sha256), None)
    agreeing = [supplier for supplier, file in same if file.sha256 in (None, sha256)]
    return Wanted(name, size, sha256, tuple(s for s in suppliers if s in agreeing))

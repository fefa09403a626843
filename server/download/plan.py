"""Which files of a repository are wanted, and who may supply each."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.download.folder import ModelKind
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


def wanted_files(files: Sequence[RemoteFile], kind: ModelKind) -> list[RemoteFile]:
    """What is worth downloading, small files first; pickles only where there are no safetensors."""
    patterns = ("config.json", *kind.tokenizers, *kind.extras, *WEIGHTS)
    here = [file for file in files if "/" not in file.name]
    chosen = [file for file in here if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
    if any(file.name.endswith(".safetensors") for file in chosen):
        chosen = [file for file in chosen if not file.name.startswith("pytorch_model")]
    return sorted(chosen, key=lambda file: (is_weights(file.name), file.name))


def is_weights(name: str) -> bool:
    return name.endswith((".bin", ".safetensors"))


def is_text(name: str) -> bool:
    """Whether a file is one that people edit, and of which sources may have different versions."""
    return not name.endswith(_LARGE)


def largest(listing: Listing, kind: ModelKind) -> RemoteFile | None:
    """The file by which a source is measured."""
    return max(wanted_files(listing.files, kind), key=lambda file: file.size, default=None)


def make_plan(suppliers: Sequence[Supplier], known: Mapping[str, Known], kind: ModelKind) -> list[Wanted]:
    """Every file that the best supplier with any weights has, as ``choose_version`` says."""
    listings = [wanted_files(supplier.listing.files, kind) for supplier in suppliers]
    chosen = next((files for files in listings if any(is_weights(file.name) for file in files)), listings[0])
    return [choose_version(file.name, suppliers, known.get(file.name)) for file in chosen]


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

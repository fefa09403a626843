"""The packages of a bundle: the wheels that the lock names, unpacked for a Python on Windows as pip would do it."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from email.message import Message
from pathlib import Path
from typing import BinaryIO, NamedTuple

from installer import install
from installer.destinations import SchemeDictionaryDestination
from installer.records import RecordEntry
from installer.sources import WheelFile
from installer.utils import parse_metadata_file

_TARGET = ("--platform", "win_amd64", "--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:")
_LICENCE = re.compile(r"[^/]*\.dist-info/(licenses/.*|[^/]*(licen[sc]e|copying|notice)[^/]*)", re.IGNORECASE)
# what only compiling needs: half of all files, which virus scanners would look at, and programs that they suspect
_LEFT_OUT = re.compile(r"torch/(include|share|bin)/.*|torch/lib/.*\.lib|setuptools/.*\.exe")


class Package(NamedTuple):
    """An unpacked package; ``licence`` is what its metadata says, ``text`` what its files say, one after the other."""

    name: str
    version: str
    licence: str
    text: bytes


def fetch(lock: Path, wheels: Path, without: Iterable[str] = ()) -> list[Path]:
    """All wheels of a lock, in the folder ``wheels``: those that are not there yet pip fetches, by their hashes.

    Raises SystemExit where pip fails, which says why.
    """
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = _entries(lock, without)
    if len(found := _matching(wanted, wheels)) == len(wanted):
        return found
    part = wheels / "wanted.txt"
    part.write_text("\n".join(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", *_TARGET, "--dest", str(wheels), "-r", str(part)]
    if subprocess.run(command).returncode:
        raise SystemExit(1)
    found = _matching(wanted, wheels)
    if len(found) != len(wanted):
        raise SystemExit(f"{wheels} has {len(found)} of {len(wanted)} wheels")
    return found


def _matching(wanted: Iterable[str], wheels: Path) -> list[Path]:
    """The wheels in a folder whose SHA-256 an entry names."""
    sums = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(wheels.glob("*.whl"))}
    found = ((sums[digest] for digest in re.findall(r"sha256:(\w{64})", entry) if digest in sums) for entry in wanted)
    return [path for paths in found for path in [next(paths, None)] if path]


def _entries(lock: Path, without: Iterable[str]) -> list[str]:
    text = lock.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if line.partition("==")[0] not in without]


class _Destination(SchemeDictionaryDestination):
    """A folder on whatever system for a Python on Windows, without what users of the bundle do not need.

    Programs in Scripts would hold the path of this machine's folder, and virus scanners suspect unsigned ones. Licences
    are collected in ``licences``: their paths are the longest of all, and Windows takes 259 characters.
    """

    def __init__(self, python: Path):
        site = str(python / "Lib" / "site-packages")
        folders = {"purelib": site, "platlib": site, "data": str(python), "scripts": str(python / "Scripts")}
        super().__init__(folders, "python.exe", "win-amd64")
        self.licences: dict[str, bytes] = {}

    def write_script(self, name: str, module: str, attr: str, section: str) -> RecordEntry:
        return RecordEntry(name, None, None)

    def write_file(self, scheme: str, path: str, stream: BinaryIO, is_executable: bool) -> RecordEntry:
        if scheme.endswith("lib") and _LICENCE.fullmatch(path):
            self.licences[path] = stream.read()
        elif not _left_out(scheme, path):
            return self.write_to_fs(scheme, path, stream, is_executable=False)
        return RecordEntry(path, None, None)

    def finalize_installation(
        self, scheme: str, record_file_path: str, records: Iterable[tuple[str, RecordEntry]]
    ) -> None:
        rows = []
        for kind, entry in records:
            if entry.hash_:  # it was written
                rows.append((("../../" if kind == "data" else "") + entry.path, *entry.to_row()[1:]))
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([*sorted(rows), (record_file_path, "", "")])
        self._path_with_destdir(scheme, record_file_path).write_text(text.getvalue(), encoding="utf-8", newline="")


def _left_out(scheme: str, path: str) -> bool:
    if scheme == "data":
        return path.startswith("Scripts/")
    return scheme == "scripts" or bool(_LEFT_OUT.fullmatch(path))


def unpack(wheels: Iterable[Path], python: Path) -> list[Package]:
    """Install wheels into the folder of an embeddable Python. Raises ValueError for a wheel whose RECORD is wrong."""
    packages = []
    for wheel in wheels:
        destination = _Destination(python)
        with WheelFile.open(wheel) as source:
            source.validate_record()
            install(source, destination, {"INSTALLER": b"pip\n"})
            metadata = parse_metadata_file(source.read_dist_info("METADATA"))
        packages.append(_describe(metadata, destination.licences))
    return sorted(packages)


def _describe(metadata: Message, texts: dict[str, bytes]) -> Package:
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    stated = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or ""
    text = b"".join(b"%s\n\n%s\n\n" % (name.encode(), texts[name]) for name in sorted(texts))
    return Package(metadata["Name"], metadata["Version"], " ".join(stated.split()), text)

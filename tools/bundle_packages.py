"""The packages of a bundle: the wheels that the lock names, unpacked for a Python on Windows as pip would do it."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import BinaryIO, NamedTuple

from installer import install
from installer.destinations import SchemeDictionaryDestination
from installer.records import RecordEntry
from installer.sources import WheelFile

_TARGET = ("--platform", "win_amd64", "--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:")
_LICENCE = re.compile(r"(licen[sc]e|copying|notice|copyright|eula)", re.IGNORECASE)


class Package(NamedTuple):
    """An unpacked package; licences are its files with their texts, relative to site-packages."""

    name: str
    version: str
    licence: str
    licences: tuple[str, ...]


def fetch(lock: Path, wheels: Path, without: Iterable[str] = ()) -> list[Path]:
    """All wheels of a lock, in the folder ``wheels``; pip checks their hashes, also of those that are there already.

    Raises SystemExit where pip fails, which says why.
    """
    wheels.mkdir(parents=True, exist_ok=True)
    wanted = _entries(lock, without)
    part = wheels / "wanted.txt"
    part.write_text("\n".join(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", *_TARGET, "--dest", str(wheels), "-r", str(part)]
    if subprocess.run(command).returncode:
        raise SystemExit(1)
    found = []
    for entry in wanted:
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        pattern = re.compile(rf"{re.sub('[-_.]+', '[-_.]', name)}-{re.escape(version)}-.*\.whl", re.IGNORECASE)
        found += [path for path in sorted(wheels.iterdir()) if pattern.fullmatch(path.name)][:1]
    if len(found) != len(wanted):
        raise SystemExit(f"{wheels} has {len(found)} of {len(wanted)} wheels")
    return found


def _entries(lock: Path, without: Iterable[str]) -> list[str]:
    text = lock.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if line.partition("==")[0] not in without]


class _Destination(SchemeDictionaryDestination):
    """A folder on whatever system for a Python on Windows; programs in Scripts are left out.

    They would hold the path of this machine's folder, and unsigned programs are what virus scanners look for.
    """

    def write_script(self, name: str, module: str, attr: str, section: str) -> RecordEntry:
        return RecordEntry(name, None, None)

    def write_file(self, scheme: str, path: str, stream: BinaryIO, is_executable: bool) -> RecordEntry:
        if scheme == "scripts":
            return RecordEntry(path, None, None)
        return self.write_to_fs(scheme, path, stream, is_executable=False)

    def finalize_installation(
        self, scheme: str, record_file_path: str, records: Iterable[tuple[str, RecordEntry]]
    ) -> None:
        rows = []
        for kind, entry in records:
            if kind != "scripts":
                above = "../../" if kind == "data" else ""
                rows.append((above + entry.path, *entry.to_row()[1:]))
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([*sorted(rows), (record_file_path, "", "")])
        self._path_with_destdir(scheme, record_file_path).write_text(text.getvalue(), encoding="utf-8", newline="")


def unpack(wheels: Iterable[Path], python: Path) -> list[Package]:
    """Install wheels into the folder of an embeddable Python. Raises ValueError for a wheel whose RECORD is wrong."""
    site = python / "Lib" / "site-packages"
    folders = {"purelib": site, "platlib": site, "data": python, "scripts": python / "Scripts"}
    destination = _Destination({name: str(path) for name, path in folders.items()}, "python.exe", "win-amd64")
    for wheel in wheels:
        with WheelFile.open(wheel) as source:
            source.validate_record()
            install(source, destination, {"INSTALLER": b"pip\n"})
    return sorted(map(_describe, site.glob("*.dist-info")))


def _describe(info: Path) -> Package:
    distribution: Distribution = PathDistribution(info)
    metadata = distribution.metadata
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    stated = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or ""
    texts = [path for path in info.rglob("*") if path.is_file() and _LICENCE.search(path.relative_to(info).as_posix())]
    licences = sorted(path.relative_to(info.parent).as_posix() for path in texts)
    return Package(metadata["Name"], metadata["Version"], stated.strip().splitlines()[0] if stated else "",
                   tuple(licences))  # fmt: skip

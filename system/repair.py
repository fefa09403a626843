"""What an installation that was cut short leaves behind."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path


def forget_half_installed(packages: Path) -> None:
    """Make pip install again what a killed one left incomplete: without its dist-info a package is not there for it."""
    for leftover in packages.glob("~*"):  # what pip was about to replace
        shutil.rmtree(leftover, ignore_errors=True)
    for info in packages.glob("*.dist-info"):
        if not _is_whole(info):
            shutil.rmtree(info)


def _is_whole(info: Path) -> bool:
    """Whether all files are there, in their sizes; the RECORD that names INSTALLER is the last thing pip writes."""
    try:
        with (info / "RECORD").open(encoding="utf-8", newline="") as file:
            sizes = {row[0]: int(row[2]) for row in csv.reader(file) if row[2]}
        return f"{info.name}/INSTALLER" in sizes and all(
            (info.parent / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, IndexError):
        return False

"""What is known of the published models without asking anybody: sizes and SHA-256 of their files.

The facts are in manifest.json: what the owners' pages on the Hugging Face Hub say. Files of which a page was not at
hand have no size there, or are not named at all; for those the sources' own listings count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MANIFEST = Path(__file__).with_name("manifest.json")


class Known(NamedTuple):
    """A published file."""

    size: int | None  # bytes; None: not known
    sha256: str


def known_files(model: str) -> Mapping[str, Known]:
    """The files of the published model called ``model`` by their names; none where nothing is known of it."""
    models = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return {name: Known(file["size"], file["sha256"]) for name, file in models.get(model, {}).items()}

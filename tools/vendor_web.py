"""Fetch the code of the pages / and /docs into server/webui/vendor, unchanged, with its licences.

    python tools/vendor_web.py            (needs npm, which asks its own registry)

For a newer version change its row (`npm view PACKAGE@VERSION dist.integrity`), run this, run
tests/functional/test_docs_page.py and test_page.py, and look at the pages.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).resolve().parent.parent / "server" / "webui" / "vendor"


class Package(NamedTuple):
    """``files`` are paths inside the package, LICENSE among them; the folder ``folder`` has them side by side."""

    folder: str
    name: str
    version: str
    licence: str
    integrity: str
    files: tuple[str, ...]


PACKAGES = (
    Package(
        "swagger-ui",
        "swagger-ui-dist",
        "5.35.0",
        "Apache-2.0",
        "sha512-U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==",
        ("swagger-ui-bundle.js", "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css", "LICENSE", "NOTICE"),
    ),
    Package(
        "marked",
        "marked",
        "18.2.1",
        "MIT",
        "sha512-ii4bxCTCqqwpT86XZWgJNs+ZnAIZksmLGYMViWA7PDIXYIeNo1x6cDdX3JOip9NM/cI6p8z57FxliACboTruMA==",
        ("lib/marked.esm.js", "LICENSE"),
    ),
    Package(
        "dompurify",
        "dompurify",
        "3.4.18",
        "Apache-2.0",
        "sha512-ofe3wI/uNm68HInABYFJYqQxRw1EaKAjNdrFVKqjUY+UZurvNd2L/HuQe097s/4RivWiZyP6tT7aoT8atjfhwg==",
        ("dist/purify.es.mjs", "LICENSE"),
    ),
    Package(
        "eventsource-parser",
        "eventsource-parser",
        "4.1.3",
        "MIT",
        "sha512-jZVIVilXZfAx6H20ZKKEj5dabbpD9ETmMj3uHsjMmgBzBHB6tsHrmdWB4mAiy3amtN6MOoVkfXRQu4wf1n88Rw==",
        ("dist/stream.js", "dist/parse.js", "dist/errors.js", "LICENSE"),
    ),
)


def fetch(package: Package, folder: str) -> Path:
    """The package as npm packs it, in ``folder``; exits if it is not the one that its integrity names."""
    npm = "npm.cmd" if os.name == "nt" else "npm"
    subprocess.run([npm, "pack", "--silent", f"{package.name}@{package.version}"], cwd=folder, check=True)
    archive = Path(folder) / f"{package.name}-{package.version}.tgz"
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise SystemExit(f"{archive.name} is not what it should be: {found}")
    return archive


def main() -> None:
    for package in PACKAGES:
        target = TARGET / package.folder
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fetch(package, folder)) as archive:
            for name in package.files:
                (target / Path(name).name).write_bytes(archive.extractfile(f"package/{name}").read())


if __name__ == "__main__":
    main()

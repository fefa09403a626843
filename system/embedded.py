"""The embeddable Python in system/python: what it has to look like, and how pip gets into it.

Standard library only: this runs before any package is there.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

VERSION = "3.11.9"  # the last one of 3.11 that python.org built for Windows
ARCHIVE = f"python-{VERSION}-embed-amd64.zip"
URL = f"https://www.python.org/ftp/python/{VERSION}/{ARCHIVE}"
SHA256 = "009d6bf7e3b2ddca3d784fa09f90fe54336d5b60f0e0f305c37f400bf83cfd3b"
# sys.path as it shall be. With this file PYTHONPATH and PYTHONHOME change nothing, and without "import site" nor does
# what other programs left in the user's site-packages; the project comes before packages with a "tests" or "tools"
PATHS = ("python311.zip", ".", "..\\..", "Lib\\site-packages")
PTH = "python311._pth"
LONGEST = 259  # characters of a path that Windows takes everywhere (MAX_PATH, less the zero at the end)
_INDEX = "https://pypi.org/simple"
_SECONDS = 60


def write_paths(python: Path) -> bool:
    """Write the ._pth file, which some guides tell people to delete; False if it was right already."""
    wanted = "".join(f"{line}\r\n" for line in PATHS).encode()
    file = python / PTH
    if file.is_file() and file.read_bytes() == wanted:
        return False
    temporary = file.with_suffix(".new")
    temporary.write_bytes(wanted)
    os.replace(temporary, file)
    return True


def path_excess(root: Path) -> int:
    """By how many characters the longest path of the bundle in ``root`` is too long for Windows' usual limit."""
    try:
        longest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))["longest_path"]
    except (OSError, ValueError, KeyError):
        return 0
    return len(str(root)) + 1 + longest - LONGEST


def add_pip(python: Path, lock: Path, wheels: Path) -> None:
    """Unpack the pip that ``lock`` names, from ``wheels`` or the package index: a wheel is a zip of what it installs.

    Raises OSError where it cannot be had, LookupError where what was found has another SHA-256.
    """
    version, digests = pinned(lock, "pip")
    name = f"pip-{version}-py3-none-any.whl"
    target = python / "Lib" / "site-packages"
    target.mkdir(parents=True, exist_ok=True)
    archive = wheels / name
    fetched = None
    if not archive.is_file():
        archive = fetched = target / f"{name}.part"
        fetched.write_bytes(fetch_from_index("pip", name))
    try:
        if hashlib.sha256(archive.read_bytes()).hexdigest() not in digests:
            raise LookupError(f"{archive.name}: SHA-256")
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    finally:
        if fetched:
            fetched.unlink()


def pinned(lock: Path, package: str) -> tuple[str, frozenset[str]]:
    """The version and the SHA-256 sums that a file of requirements with hashes has for a package."""
    text = lock.read_text(encoding="utf-8").replace("\\\n", "")
    found = re.search(rf"^{re.escape(package)}==(\S+)(.*)$", text, re.MULTILINE)
    if not found:
        raise LookupError(f"{lock.name}: {package}")
    return found[1], frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", found[2]))


def fetch_from_index(package: str, name: str) -> bytes:
    """The file ``name`` of a package. Raises OSError where the package index cannot be reached or does not have it."""
    page = f"{package_index().rstrip('/')}/{package}/"
    with urllib.request.urlopen(page, timeout=_SECONDS) as answer:
        links = _Links()
        links.feed(answer.read().decode("utf-8", "replace"))
        page = answer.url  # mirrors redirect
    for link in (urllib.parse.urljoin(page, link) for link in links.found):
        if urllib.parse.unquote(urllib.parse.urlsplit(link).path).endswith(f"/{name}"):
            with urllib.request.urlopen(link, timeout=_SECONDS) as answer:
                return answer.read()
    raise FileNotFoundError(f"{page} has no {name}")


def package_index(environment: Mapping[str, str] = os.environ) -> str:
    """The index that pip would ask: PIP_INDEX_URL, else the user's or the machine's pip.ini, else pip's own default."""
    if url := environment.get("PIP_INDEX_URL"):
        return url
    files = [environment.get("PIP_CONFIG_FILE")]
    for folder, below in (("APPDATA", "pip"), ("USERPROFILE", "pip"), ("PROGRAMDATA", "pip")):
        files.append(environment.get(folder) and os.path.join(environment[folder], below, "pip.ini"))
    for file in filter(None, files):
        settings = configparser.RawConfigParser()
        try:
            settings.read(file, encoding="utf-8-sig")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for section in ("install", "global"):
            if url := settings.get(section, "index-url", fallback=None):
                return url
    return _INDEX


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]

"""The embeddable Python in system/python: what it has to look like, and how pip gets into it.

Standard library only: this runs before any package is there.
"""

from __future__ import annotations

import configparser
import hashlib
import http.client
import json
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Collection, Mapping, Sequence
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
# pip in one file, by its own makers: https://pip.pypa.io/en/stable/installation/#standalone-zip-application
_PIP_APP = os.environ.get("BOOTSTRAP_PIP_URL", "https://bootstrap.pypa.io/pip/pip.pyz")
# pip refuses to replace itself where the program is called "pip", as the folder in its wheel is
_RUN_WHEEL = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('pip', run_name='__main__')"
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


def find_pip(lock: Path, wheels: Path, work: Path) -> tuple[Sequence[str], Sequence[str]]:
    """A pip that can be run without being installed: arguments of Python, and where that pip finds what it installs.

    It is the wheel that ``lock`` names, from ``wheels`` or the index that is configured, else PyPA's zip application,
    which knows an index of its own. What is fetched lies in the folder ``work``. Raises OSError where it cannot be had,
    LookupError where the wheel that was found has another SHA-256.
    """
    version, digests = pinned(lock, "pip")
    wheel = wheels / f"pip-{version}-py3-none-any.whl"
    if not _is_right(wheel, digests):
        index = package_index()
        if not index:
            app = work / "pip.pyz"
            app.write_bytes(_fetch(_PIP_APP)[0])
            return [str(app)], []
        wheel = work / wheel.name
        wheel.write_bytes(_fetch_from_index(index, "pip", wheel.name))
        if not _is_right(wheel, digests):
            raise LookupError(f"{wheel.name}: SHA-256")
    return ["-c", _RUN_WHEEL, str(wheel)], ["--no-index", "--find-links", str(wheel.parent)]


def _is_right(file: Path, digests: Collection[str]) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() in digests


def pinned(lock: Path, package: str) -> tuple[str, frozenset[str]]:
    """The version and the SHA-256 sums that a file of requirements with hashes has for a package."""
    text = lock.read_text(encoding="utf-8").replace("\\\n", "")
    found = re.search(rf"^{re.escape(package)}==(\S+)(.*)$", text, re.MULTILINE)
    if not found:
        raise LookupError(f"{lock.name}: {package}")
    return found[1], frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", found[2]))


def _fetch_from_index(index: str, package: str, name: str) -> bytes:
    content, page = _fetch(f"{index.rstrip('/')}/{package}/")
    links = _Links()
    links.feed(content.decode("utf-8", "replace"))
    for link in (urllib.parse.urljoin(page, link) for link in links.found):
        if urllib.parse.unquote(urllib.parse.urlsplit(link).path).endswith(f"/{name}"):
            return _fetch(link)[0]
    raise FileNotFoundError(f"{page} has no {name}")


def _fetch(url: str) -> tuple[bytes, str]:
    """What is there, and where it was found in the end: mirrors redirect. Raises OSError."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            return answer.read(), answer.url
    except (ValueError, http.client.HTTPException) as error:  # no address at all, or half an answer
        raise OSError(f"{url}: {error}") from None


def package_index(environment: Mapping[str, str] = os.environ) -> str | None:
    """The index that pip is told to ask: by PIP_INDEX_URL, else by the user's or the machine's pip.ini."""
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
    return None


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]

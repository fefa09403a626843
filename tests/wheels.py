"""Tiny wheels, and pip in one file, for the tests of the installer."""

import base64
import hashlib
import zipfile
from pathlib import Path


def make_wheel(
    folder: Path, name: str, version: str, module: str = "", more: dict[str, str] | None = None, metadata: str = ""
) -> None:
    """A wheel with one module; ``more``: other files in it, ``metadata``: other lines of its METADATA."""
    contents = {
        f"{name}.py": module or f"version = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(more or {}),
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    record_path = f"{name}-{version}.dist-info/RECORD"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**contents, record_path: record + f"{record_path},,\n"}.items():
            archive.writestr(path, text)


def make_pip_app(wheel: Path, app: Path) -> None:
    """A wheel of pip as PyPA's zip application: the same files without dist-info, and what calls them."""
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(app, "w") as made:
        for name in packed.namelist():
            if name.startswith("pip/"):
                made.writestr(name, packed.read(name))
        made.writestr("__main__.py", "import runpy\nrunpy.run_module('pip', run_name='__main__')\n")

"""What a bundle is put together from besides Python: the project's files, licences, a manifest, and the zip."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tools.bundle_packages import Package

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "chatglm-portable"  # in which everything lies: "unpack here" must not scatter it
PROJECT = ("server", "system", "docs", "THUDM/demo", "*.bat", "README.md", "LICENSE", "requirements.txt")
MANIFEST = "manifest.json"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold
_STORED = (".safetensors", ".bin", ".pt", ".gguf", ".zip", ".whl")  # nothing to be gained by compressing them
_CHUNK = 1 << 20


def copy_project(target: Path) -> None:
    """The files of the product that git knows, without tests and tools."""
    command = ["git", "-c", "core.quotepath=off", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard", "--", *PROJECT]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            content = (ROOT / name).read_bytes()
            if name.endswith(".bat"):  # whatever git made of its line ends on this system
                content = content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
            (target / name).write_bytes(content)


def copy_model(source: Path, target: Path) -> None:
    """A complete model folder, without what can be made again. Raises SystemExit where it is not complete."""
    from server.download.folder import missing_files

    if missing := missing_files(source):
        raise SystemExit(f"{source} is no complete model: {', '.join(missing)}")
    home = target / "THUDM" / source.name
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") or part == "quantized" for part in name.parts):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / name)
    if source.name != "chatglm2-6b":  # the one that a double-click starts anyway
        (target / "config.toml").write_text(f"model = '{source.name}'\n", encoding="utf-8")


def write_licences(target: Path, packages: Iterable[Package], texts: Mapping[str, bytes]) -> None:
    """licences/ with a file for every part that brings texts, and a table of all; ``texts``: those of the kernels."""
    folder = target / "licences"
    folder.mkdir()
    packages = list(packages)
    for name, text in [*texts.items(), *((f"{p.name}.txt", p.text) for p in packages if p.text)]:
        (folder / name).write_bytes(text)
    rows = [("chatglm-portable", "", "Apache-2.0", ["../LICENSE"]),
            ("Python", "3.11.9", "PSF-2.0", ["../system/python/LICENSE.txt"]),
            ("Swagger UI", "", "Apache-2.0", ["../server/webui/vendor/swagger-ui/LICENSE"]),
            ("server/kernels/cpu/ready", "", "MIT, ZPL-2.1", sorted(texts))]  # fmt: skip
    for package in packages:
        own = [f"{package.name}.txt"] if package.text else ["../LICENSE"] if "Apache" in package.licence else []
        rows.append((package.name, package.version, package.licence, own))
    lines = ["# 许可 · Licences", "",
             "整合包里每个部分的许可。没有许可文件的，以作者在元数据里写明的为准。",
             "The licence of every part. Where a part brings no text, its metadata names the licence.", "",
             "| part | version | licence | text |", "|---|---|---|---|"]  # fmt: skip
    for name, version, licence, paths in rows:
        links = " ".join(f"[{path.rpartition('/')[2]}](<{path}>)" for path in paths)
        lines.append(f"| {name} | {version} | {licence.replace('|', '/')} | {links} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_manifest(target: Path, about: Mapping[str, object]) -> None:
    """What the bundle is, the SHA-256 of every file, and how long the longest path is in it."""
    files = {path.relative_to(target).as_posix(): _sha256(path) for path in _files(target)}
    longest = max(map(len, files))
    content = {**about, "longest_path": longest, "files": files}
    (target / MANIFEST).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8",
                                   newline="\n")  # fmt: skip


def write_zip(source: Path, archive: Path) -> None:
    """Pack a folder so that the same files always give the same bytes (of one zlib)."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    part = archive.with_name(archive.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as made:
        for path in _files(source):
            item = zipfile.ZipInfo(f"{FOLDER}/{path.relative_to(source).as_posix()}", _DATE)
            item.compress_type = zipfile.ZIP_STORED if path.suffix in _STORED else zipfile.ZIP_DEFLATED
            item.create_system, item.external_attr = 3, 0o644 << 16
            item.file_size = path.stat().st_size
            with path.open("rb") as file, made.open(item, "w") as inside:
                shutil.copyfileobj(file, inside, _CHUNK)
    part.replace(archive)


def _files(folder: Path) -> list[Path]:
    """All files, in an order that no file system decides."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.as_posix())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What a bundle is put together from besides Python: the project's files, licences, a manifest, and the zip."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from server.converted import replacement, sha256
from server.download.folder import DEFAULT_MODEL, missing_files
from tools import vendor_web
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


def check_model(source: Path) -> None:
    """Raises SystemExit where a folder is not a model with all of its original weights and its licence."""
    if missing := missing_files(source, originals=True):
        raise SystemExit(f"{source} lacks {', '.join(missing)}: python -m server download completes a published model")
    if not _model_licences(source):
        raise SystemExit(f"{source} has no MODEL_LICENSE or LICENSE: a model is only passed on with it")
    if source.name == "demo":
        raise SystemExit(f"{source} has the name of the demo model, which is in every bundle: rename it")


def copy_model(source: Path, target: Path) -> None:
    """A model folder without what can be made again or was left behind, and config.toml to start it."""
    made = replacement(source)  # of pickles, which need not be there any more
    superfluous = {path.name for path in made.originals} if made else set()
    home = target / "THUDM" / source.name
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        unwanted = path.suffix == ".part" or any(part.startswith(".") or part == "quantized" for part in name.parts)
        if path.is_file() and not unwanted and str(name) not in superfluous:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / name)
    if source.name != Path(DEFAULT_MODEL).name:  # the one that a double-click starts anyway
        line = f"model = {json.dumps(source.name, ensure_ascii=False)}\n"
        (target / "config.toml").write_text(line, encoding="utf-8", newline="\n")


def _model_licences(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if re.match("(model_)?licen[sc]e", path.name, re.IGNORECASE))


def write_licences(
    target: Path, packages: Iterable[Package], texts: Mapping[str, bytes], model: Path | None = None
) -> None:
    """licences/ with a file for every part that brings texts, and a table of all; ``texts``: those of the kernels."""
    folder = target / "licences"
    folder.mkdir()
    packages = list(packages)
    for name, text in [*texts.items(), *((f"{p.name}.txt", p.text) for p in packages if p.text)]:
        (folder / name).write_bytes(text)
    rows = [("chatglm-portable", "", "Apache-2.0", ["../LICENSE"]),
            ("Python", "3.11.9", "PSF-2.0", ["../system/python/LICENSE.txt"]),
            ("server/kernels/cpu/ready", "", "MIT, ZPL-2.1", sorted(texts))]  # fmt: skip
    for part in vendor_web.PACKAGES:
        rows.append((part.name, part.version, part.licence, [f"../server/webui/vendor/{part.folder}/LICENSE"]))
    if model:
        own = [f"../THUDM/{model.name}/{name}" for name in _model_licences(model)]
        rows.append((model.name, "", "its own", own))
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
    files = {path.relative_to(target).as_posix(): sha256(path) for path in _files(target)}
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

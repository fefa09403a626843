"""The model's files: all there, whole, and of a model that this program runs."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.adapters import check_adapters, check_model
from server.config import Config
from server.doctor.machine import Model
from server.doctor.result import Complaint, Result, conclude, problem, warning
from server.download.folder import converted_files, incomplete, repositories
from server.models.generations import AUTO, TITLES, Told, check_folder, tell_folder
from server.profiles import Note

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
HASH_SECONDS = 8.0
_HEADER_MOST = 100 * 2**20  # bytes of a safetensors header, as the format's own reader allows
AGAIN = ("删掉坏的文件再启动，会重新下载（自己放的模型请重新复制）",
         "delete the damaged files and start again, which downloads them (or copy them again)")  # fmt: skip


# names of published files -> bytes (None: not known) and SHA-256
Published = Mapping[str, tuple[int | None, str]]


def check_model_files(model: Model, config: Config, root: Path, size: int | None, published: Published) -> Result:
    """``size``: bytes that the missing model takes, where it is published. Raises ModelError as the server does."""
    folder, missing = model
    check_adapters(config)
    check_folder(folder, config.family)
    check_model(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()}
    made = {file.path.relative_to(folder).as_posix(): file.path.stat().st_size for file in converted_files(folder)}
    facts: dict[str, Any] = {"folder": str(folder), "missing": missing, "files": files, "converted": [*made]}
    if missing:
        return _incomplete(model, root, size, facts)
    damaged = {name: why for name in files if (why := damage(folder / name))}
    known = {name: published[name] for name in files if name in published}
    sizes, hashed = compare(folder, known)
    damaged |= sizes
    changed = [name for name, same in hashed.items() if not same]
    told = tell_folder(folder) if config.family == AUTO else Told(config.family)
    title = TITLES.get(told.family or "", "?")
    total = f"{sum({**files, **made}.values()) / 1e9:.2f} GB"
    facts |= {"damaged": damaged, "family": told.family, "hashed": hashed}
    sums = ("", "")
    if known:
        sums = (f"，SHA-256 核对了 {len(hashed)}/{len(known)} 个",
                f", SHA-256 compared for {len(hashed)} of {len(known)}")  # fmt: skip
    whole = ("", "") if damaged else ("齐全，", "complete, ")
    instead = (f"，权重在转换成的 {'、'.join(made)} 里", f", weights in the converted {', '.join(made)}")
    instead = instead if made else ("", "")
    said = Note(f"{title}，{whole[0]}{len({**files, **made})} 个文件，{total}{sums[0]}{instead[0]}：{folder}",
                f"{title}, {whole[1]}{len({**files, **made})} files, {total}{sums[1]}{instead[1]}: {folder}")
    complaints: list[Complaint] = []
    if damaged:
        listed = ", ".join(f"{name} ({why})" for name, why in damaged.items())
        complaints.append(problem(f"文件坏了：{listed}", f"damaged: {listed}", do=AGAIN))
    if changed:
        listed = ", ".join(changed)
        complaints.append(warning(f"和官方发布的不一样：{listed}", f"not as published: {listed}",
                                  do=("不是自己改过的就" + AGAIN[0], "unless you changed them, " + AGAIN[1])))
    if told.guessed:
        complaints.append(warning(f"没有说明是哪一代，按 {title} 运行", f"nothing says which generation it is, so it "
                                  f"runs as {title}", do=("如果是另一代，用 --family 指明",
                                                          "if it is another one, name that with --family")))
    return conclude(said, complaints, facts=facts)


def _incomplete(model: Model, root: Path, size: int | None, facts: dict[str, Any]) -> Result:
    folder, missing = model
    if not repositories(folder, root):
        error = incomplete(folder, missing)
        return conclude(None, [problem(error.zh, error.en, do=None)], facts=facts)
    about = (f"（约 {size / 1e9:.1f} GB）", f" (about {size / 1e9:.1f} GB)") if size else ("", "")
    listed = "还缺 " + "、".join(missing).replace(" or ", " 或 "), "lacks " + ", ".join(missing)
    if not facts["files"]:
        listed = "还没有下载", "is not downloaded yet"
    complaint = warning(f"{folder} {listed[0]}", f"{folder} {listed[1]}",
                        do=(f"启动时会自动下载缺的文件{about[0]}，也可以自己放进去",
                            f"they are downloaded at the start{about[1]}, or put them there yourself"))  # fmt: skip
    return conclude(None, [complaint], facts=facts)


def compare(
    folder: Path, known: Published, seconds: float = HASH_SECONDS
) -> tuple[dict[str, str], dict[str, bool]]:
    """Files of another size with what is wrong; for as many others as are read within ``seconds``, small ones first,
    whether their SHA-256 is the published one."""
    sizes = {name: (folder / name).stat().st_size for name in known}
    wrong = {name: f"{sizes[name]} bytes instead of {size}" for name, (size, _) in known.items()
             if size not in (None, sizes[name])}  # fmt: skip
    deadline, hashed = time.monotonic() + seconds, {}
    for name in sorted(known.keys() - wrong.keys(), key=sizes.__getitem__):
        if (found := _sha256(folder / name, deadline)) is not None:
            hashed[name] = found == known[name][1]
    return wrong, hashed


def _sha256(path: Path, deadline: float) -> str | None:
    """None where the time is over."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if time.monotonic() > deadline:
                return None
            digest.update(block)
    return digest.hexdigest()


def damage(path: Path) -> str:
    """What is wrong with a file as a look at its ends shows; "" for nothing. Raises OSError."""
    try:
        if path.suffix == ".safetensors":
            return _damage_of_safetensors(path)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        if path.match("pytorch_model*.bin"):
            return _damage_of_pickle(path)
        return "empty" if path.suffix == ".model" and not path.stat().st_size else ""
    except (ValueError, RecursionError):
        return "not valid JSON"


def _damage_of_safetensors(path: Path) -> str:
    """The header names the last byte, so that a cut file is known without reading it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_MOST, size - 8):
            return "no safetensors file"
        header = json.loads(file.read(length))
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (AttributeError, LookupError, TypeError):
        return "no safetensors file"
    return "" if size == expected else f"{size} bytes instead of {expected}"


def _damage_of_pickle(path: Path) -> str:
    """PyTorch's files are zips, whose directory is at the end; older ones have nothing there to look at."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return "" if zipfile.is_zipfile(path) else "cut off"
    return "" if start[:1] == b"\x80" else "no PyTorch file"

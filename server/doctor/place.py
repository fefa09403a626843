"""The folder that the program lies in, and its disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from server.doctor.result import Complaint, Result, conclude, gib, problem, warning
from server.footprint import GiB
from server.profiles import Note

MAX_PATH = 260  # with the end mark; Windows without long paths
DEEPEST = len("system\\python\\Lib\\site-packages\\") + 140  # where no manifest says it: that of PyTorch's files
SPARE = 2 * GiB
MOVE = ("把整个文件夹移到短的路径，例如 D:\\chatglm", "move the whole folder to a short path such as D:\\chatglm")


class Place(NamedTuple):
    path: PurePath
    onedrive: tuple[str, ...] = ()  # the folders that OneDrive keeps in step
    temporary: str = ""  # the system's folder for temporary files
    long_paths: bool = True  # whether Windows allows paths of more than 260 characters
    write_error: str = ""
    deepest: int = DEEPEST  # characters of the longest path in the folder


def read_place(root: Path, env: Mapping[str, str] = os.environ) -> Place:
    windows = sys.platform == "win32"
    return Place(
        (PureWindowsPath if windows else PurePosixPath)(root),
        tuple(env[name] for name in ("OneDrive", "OneDriveConsumer", "OneDriveCommercial") if env.get(name)),
        _temporary(),
        _long_paths() if windows else True,
        _write_error(root),
        _deepest(root / "manifest.json"),
    )


def _deepest(manifest: Path) -> int:
    """As the bundle's manifest says, which counts the packages too."""
    try:
        return int(json.loads(manifest.read_bytes())["longest_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return DEEPEST


def _write_error(root: Path) -> str:
    # no tempfile: on Windows that of Python 3.11 tries 10000 names in a folder that it may not write, then blames those
    path = root / f"doctor-{os.getpid()}.tmp"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        path.unlink()
        return ""
    except OSError as error:
        return error.strerror or str(error)


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # there is none that can be written
        return ""


def _long_paths() -> bool:
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SYSTEM\CurrentControlSet\Control\FileSystem") as key:
            return winreg.QueryValueEx(key, "LongPathsEnabled")[0] == 1
    except OSError:
        return False


def judge_place(place: Place) -> Result:
    text, windows = str(place.path), isinstance(place.path, PureWindowsPath)
    complaints: list[Complaint] = []
    if place.write_error:
        complaints.append(problem(f"不能写入（{place.write_error}）", f"cannot be written ({place.write_error})",
                                  do=("移到自己能写的文件夹，不要放在 Program Files 里",
                                      "move it to a folder of your own, not below Program Files")))
    if windows and "%" in text:
        complaints.append(problem("路径里有 %，cmd 会把它当成变量", "cmd takes the % in the path for a variable",
                                  do=("给文件夹改名，去掉 %", "rename the folder without the %")))
    if windows and text.startswith("\\\\"):
        complaints.append(problem("在网络共享上，cmd 不能从那里启动", "cmd cannot start programs from a network share",
                                  do=("复制到本机的硬盘上", "copy it to a disk of this computer")))
    if not windows and ":" in text:
        complaints.append(problem("路径里有冒号，PYTHONPATH 会断开", "the colon in the path splits PYTHONPATH",
                                  do=("给文件夹改名，去掉冒号", "rename the folder without the colon")))
    if windows and not place.long_paths and len(text) + 1 + place.deepest >= MAX_PATH:
        complaints.append(warning(f"路径长 {len(text)} 个字符，里面的文件可能超过 Windows 的上限 260",
                                  f"{len(text)} characters are long: files in it may go beyond Windows' limit of 260",
                                  do=MOVE))
    if windows and _is_below(place.path, place.temporary):  # where Explorer unpacks what is opened inside a zip
        complaints.append(warning("在临时文件夹里，系统会清理（是不是还没有解压？）",
                                  "in the folder for temporary files, which is cleaned up (is it unpacked yet?)",
                                  do=("先把 zip 全部解压到硬盘上", "unpack the whole zip to a disk first")))
    named = any(part.lower().startswith("onedrive") for part in place.path.parts)
    if named or any(_is_below(place.path, folder) for folder in place.onedrive):
        complaints.append(warning("在 OneDrive 里，几 GB 的模型会被上传，文件可能被移到云端",
                                  "in OneDrive, which uploads gigabytes of the model and may move files away",
                                  do=MOVE))
    facts = {"path": text, "length": len(text), "long_paths": place.long_paths, "writable": not place.write_error}
    return conclude(Note(text, text), complaints, facts=facts)


def _is_below(path: PurePath, folder: str) -> bool:
    parent = type(path)(folder)
    return bool(folder) and (parent == path or parent in path.parents)


class Disk(NamedTuple):
    """Sizes in bytes: ``model`` is what is still to be downloaded, ``kept`` what the quantized model will take."""

    total: int
    free: int
    model: int = 0
    kept: int = 0


def read_disk(path: Path, model: int, kept: int) -> Disk:
    """Raises OSError for a disk that does not answer."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = shutil.disk_usage(path)
    return Disk(usage.total, usage.free, model, kept)


def judge_disk(disk: Disk) -> Result:
    said = Note(f"空闲 {gib(disk.free)}，共 {gib(disk.total)}", f"{gib(disk.free)} of {gib(disk.total)} are free")
    complaints: list[Complaint] = []
    do = ("清理磁盘，或把整个文件夹移到空间大的盘", "free some space, or move the whole folder to a larger disk")
    if disk.free < disk.model:
        complaints.append(problem(f"放不下模型，还要 {gib(disk.model)}", f"the model does not fit: it takes "
                                  f"{gib(disk.model)} more", do=do))
    elif disk.free < disk.model + disk.kept:
        complaints.append(warning(f"量化后的模型（{gib(disk.kept)}）放不下，每次启动都要重新量化",
                                  f"no room for the quantized model ({gib(disk.kept)}), which is then made again at "
                                  "each start", do=do))
    elif disk.free < disk.model + disk.kept + SPARE:
        complaints.append(warning("快满了", "nearly full", do=do))
    return conclude(said, complaints, facts=disk._asdict())

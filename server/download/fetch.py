"""Downloading a model from the Hugging Face Hub, or a mirror that speaks its protocol.

huggingface_hub finishes each file or drops it: what is resumed after a stop are the files that are complete.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from server.config import ROOT, ROWS
from server.download.folder import CHAT, ModelKind, incomplete, locate, missing_files, repositories
from server.errors import StartupError
from server.hardware import disk_free
from server.i18n import system_language

HUGGING_FACE = ROWS["endpoint"].default
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
SPARE_BYTES = 200 * 10**6  # left free on the disk
RETRY_SECONDS = (1.0, 4.0)  # waits before asking a busy server again

T = TypeVar("T")


class RemoteFile(NamedTuple):
    name: str
    size: int  # bytes


class Snapshot(NamedTuple):
    """One state of a repository."""

    repository: str
    revision: str
    files: Sequence[RemoteFile]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def ensure_model(
    name: str,
    kind: ModelKind = CHAT,
    *,
    endpoint: str = HUGGING_FACE,
    root: Path = ROOT,
    language: str | None = None,
    announce: Callable[[int], None] | None = None,
) -> Path:
    """The folder of the model called ``name``, downloaded into ``root``/THUDM if it is not complete.

    A complete folder is taken as it is, without the network. ``announce`` is called before a download, with the size
    of the whole model in bytes. Raises StartupError for an unknown name and for every way in which a download fails,
    ModelError for a folder of the user's own that lacks files.
    """
    folder = locate(name, root, kind)
    missing = missing_files(folder, kind)
    if not missing:
        return folder
    candidates = repositories(folder, root, kind)
    if not candidates:
        raise incomplete(folder, missing, kind)
    endpoint = endpoint.rstrip("/")
    _prepare_hub(endpoint)
    try:
        snapshot = _find(kind, candidates, endpoint, folder)
        if announce:
            announce(snapshot.size)
        _download(snapshot, endpoint, folder, zh=(language or system_language()) == "zh")
    except KeyboardInterrupt:
        raise StartupError(f"下载中断了：{folder} 里已完成的文件都保留，下次启动接着下其余的（没下完的文件从头下）。",
                           f"Download interrupted: the files finished so far stay in {folder}, the next start goes on "
                           "with the others (the one under way starts again).") from None
    if missing := missing_files(folder, kind):
        names = ", ".join(missing)
        zh = names.replace(" or ", " 或 ")
        raise StartupError(f"从 {endpoint} 下载完了，但 {folder} 里仍缺少 {zh}：请换一个 --endpoint。",
                           f"Downloaded from {endpoint}, but {folder} still lacks {names}: try another --endpoint.",
                           param="endpoint")
    return folder


def download_size(name: str, *, endpoint: str, root: Path = ROOT) -> int | None:
    """Bytes of a known chat model's files; None if the server does not say."""
    folder = locate(name, root)
    endpoint = endpoint.rstrip("/")
    _prepare_hub(endpoint)
    try:
        return _find(CHAT, repositories(folder, root), endpoint, folder).size
    except StartupError:
        return None


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


def _prepare_hub(endpoint: str) -> None:
    """Must come before huggingface_hub is imported: it reads the environment only then."""
    os.environ["HF_ENDPOINT"] = endpoint
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if endpoint != HUGGING_FACE:
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # a mirror passes the Xet store's own, often blocked, host on
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request


def _download(snapshot: Snapshot, endpoint: str, folder: Path, *, zh: bool) -> None:
    left = [file for file in snapshot.files if not _is_complete(folder, file)]
    _drop_orphans(folder)
    _check_disk(left, folder)
    done, size = len(snapshot.files) - len(left), readable(sum(file.size for file in left))
    if zh:
        print(f"从 {endpoint} 下载 {snapshot.repository} 到 {folder}：还差 {len(left)} 个文件 {size}（已有 {done} 个）")
    else:
        print(f"Downloading {snapshot.repository} from {endpoint} to {folder}: {len(left)} files, {size} to go "
              f"({done} are there)")
    for number, file in enumerate(left, 1):
        label = f"({number}/{len(left)}) {file.name}"
        if not sys.stderr.isatty():  # where there is no progress bar
            print(f"{label}  {readable(file.size)}", flush=True)
        _fetch(snapshot, file, endpoint, folder, label)


def _find(kind: ModelKind, candidates: Sequence[str], endpoint: str, folder: Path) -> Snapshot:
    """The first of the candidates that the server has."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi(endpoint=endpoint)
    for repository in candidates:
        with _as_sentences(endpoint, repository, folder):
            try:
                info = _patiently(lambda repo=repository: api.model_info(repo, files_metadata=True, timeout=15))
            except GatedRepoError:
                raise  # a subclass of the next one
            except RepositoryNotFoundError:
                continue
        files = [RemoteFile(entry.rfilename, entry.size or 0) for entry in info.siblings or ()]
        return Snapshot(repository, info.sha, _wanted(files, kind))
    names = ", ".join(candidates)
    raise StartupError(f"{endpoint} 上没有 {names}：请换一个 --endpoint，或把模型文件自己放进 {folder}。",
                       f"{endpoint} has none of {names}: try another --endpoint, or put the model's files into "
                       f"{folder} yourself.", param="endpoint")


def _wanted(files: Sequence[RemoteFile], kind: ModelKind) -> list[RemoteFile]:
    """What is worth downloading, small files first; pickles only where there are no safetensors."""
    patterns = ("config.json", *kind.tokenizers, *kind.extras, *WEIGHTS)
    here = [file for file in files if "/" not in file.name]
    chosen = [file for file in here if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
    if any(file.name.endswith(".safetensors") for file in chosen):
        chosen = [file for file in chosen if not file.name.startswith("pytorch_model")]
    return sorted(chosen, key=lambda file: (file.name.endswith((".bin", ".safetensors")), file.name))


def _is_complete(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _drop_orphans(folder: Path) -> None:
    """Delete what a killed download left: huggingface_hub neither uses it again nor removes it."""
    for path in (folder / ".cache" / "huggingface" / "download").glob("*.incomplete"):
        with contextlib.suppress(OSError):
            path.unlink()


def _check_disk(left: Sequence[RemoteFile], folder: Path) -> None:
    needed, free = sum(file.size for file in left) + SPARE_BYTES, disk_free(folder)
    if needed > free:
        raise _disk_full(folder, free, needed)


def _fetch(snapshot: Snapshot, file: RemoteFile, endpoint: str, folder: Path, label: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **keywords: Any):
            super().__init__(*args, **{**keywords, "desc": label})  # the hub would show the end of an address

    def download() -> str:
        return hf_hub_download(snapshot.repository, file.name, revision=snapshot.revision, endpoint=endpoint,
                               local_dir=folder, tqdm_class=Bar)

    with _as_sentences(endpoint, snapshot.repository, folder):
        _patiently(download)


def _patiently(call: Callable[[], T]) -> T:
    """Again, a little later, while the server says that it is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    for seconds in RETRY_SECONDS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            time.sleep(seconds)
    return call()


@contextlib.contextmanager
def _as_sentences(endpoint: str, repository: str, folder: Path) -> Iterator[None]:
    """Turns what huggingface_hub raises into StartupErrors."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(endpoint, repository, error.response.status_code) from error
    except PermissionError as error:
        raise StartupError(f"不能写入 {folder}：请检查权限，或把程序移到别的文件夹。",
                           f"Cannot write to {folder}: check its permissions, or move the program.") from error
    except (HTTPError, OSError, ValueError) as error:  # HTTPError: no connection; ValueError: not a hub that answers
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise _disk_full(folder, disk_free(folder)) from error
        raise _unreachable(endpoint, repository, folder) from error


def _refused(endpoint: str, repository: str, status: int) -> StartupError:
    if status in (401, 403):
        return StartupError(
            f"{endpoint} 不让下载 {repository}（{status}）：请设置环境变量 HF_TOKEN，或换一个 --endpoint。",
            f"{endpoint} does not let you download {repository} ({status}): set HF_TOKEN, or try another --endpoint.",
            param="endpoint")
    return StartupError(
        f"{endpoint} 下载 {repository} 出错（{status}）：请稍后再试（已完成的文件会保留），或换一个 --endpoint。",
        f"{endpoint} failed with {repository} ({status}): try again later (finished files are kept), or use "
        "another --endpoint.", param="endpoint")


def _unreachable(endpoint: str, repository: str, folder: Path) -> StartupError:
    return StartupError(
        f"从 {endpoint} 下载 {repository} 失败，连不上或连接断了：请检查网络（国内可设环境变量 "
        f"HF_ENDPOINT=https://hf-mirror.com）后再试，或把模型文件自己放进 {folder}。",
        f"Could not download {repository} from {endpoint}, no connection or it broke off: check the network (in China "
        f"set HF_ENDPOINT=https://hf-mirror.com) and try again, or put the model's files into {folder} yourself.",
        param="endpoint")


def _disk_full(folder: Path, free: int, needed: int | None = None) -> StartupError:
    zh, en = (f"要 {readable(needed)}，", f"{readable(needed)} are needed, ") if needed else ("", "")
    return StartupError(f"{folder} 所在的磁盘满了：{zh}只剩 {readable(free)}。请腾出空间再试。",
                        f"The disk with {folder} is full: {en}{readable(free)} are free. Make room and try again.")

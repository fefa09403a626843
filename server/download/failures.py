"""What the user is told when a download fails: what is wrong, what is kept, what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from server.download.folder import Repositories
from server.download.progress import readable
from server.download.sources import Source, title
from server.download.web import SourceError
from server.errors import Interrupted, StartupError
from server.hardware import disk_free

Reasons = Sequence[tuple[Source, SourceError]]


def nobody_has_it(reasons: Reasons, names: Repositories, folder: Path) -> StartupError:
    """No source gave a listing of the model."""
    if reasons and all(error.status == 404 for _, error in reasons):
        called = ", ".join(dict.fromkeys([*names.hub, *names.modelscope]))
        places = [title(source) for source, _ in reasons]
        return StartupError(
            f"{'、'.join(places)} 上没有 {called}：请换一个 --source，或把模型文件自己放进 {folder}。",
            f"{', '.join(places)} has none of {called}: try another --source, or put the model's files into {folder} "
            "yourself.", param="source")  # fmt: skip
    zh, en = _list(reasons)
    do_zh, do_en = _advice(reasons)
    return StartupError(
        f"{folder.name} 下载不了。{zh}。请{do_zh}，或把模型文件自己放进 {folder}。",
        f"Could not download {folder.name}. {en}. {do_en}, or put the model's files into {folder} yourself.",
        param="source")  # fmt: skip


def nobody_gives_it(name: str, reasons: Reasons, folder: Path) -> StartupError:
    """No source gave a file to its end."""
    if not reasons:
        return StartupError(
            f"{name} 在所有下载源上都和官方公布的校验和不一致：请换一个 --source，或把这个文件自己放进 {folder}。",
            f"No source has {name} as it was published: try another --source, or put the file into {folder} yourself.",
            param="source")  # fmt: skip
    zh, en = _list(reasons)
    do_zh, do_en = _advice(reasons)
    return StartupError(
        f"{name} 没有下载完。{zh}。已下载的部分留在 {folder}，下次接着下：请{do_zh}。",
        f"{name} was not downloaded to its end. {en}. What was downloaded stays in {folder} and is gone on with next "
        f"time. {do_en}.", param="source")  # fmt: skip


def _list(reasons: Reasons) -> tuple[str, str]:
    zh = "；".join(f"{title(source)} {error.zh}" for source, error in reasons)
    return zh, "; ".join(f"{title(source)}: {error.en}" for source, error in reasons)


def _advice(reasons: Reasons) -> tuple[str, str]:
    if any(error.status in (401, 403) for _, error in reasons):
        return ("把环境变量 HF_TOKEN 设为有效的令牌，或换一个 --source 再试",
                "Set the environment variable HF_TOKEN to a valid token, or try another --source")  # fmt: skip
    if len(reasons) == 1:
        return ("检查网络和代理后再试，或去掉 --source、--endpoint 和环境变量 HF_ENDPOINT（会在 ModelScope、hf-mirror "
                "和 Hugging Face 里选最快的），国内也可设 HF_ENDPOINT=https://hf-mirror.com",
                "Check network and proxy and try again, or leave out --source, --endpoint and the variable HF_ENDPOINT "
                "(then the fastest of ModelScope, hf-mirror and Hugging Face is taken); in China HF_ENDPOINT=https://"
                "hf-mirror.com is another way")  # fmt: skip
    return "检查网络和代理后再试", "Check network and proxy and try again"


def lacks_files(folder: Path, missing: Sequence[str], places: Sequence[Source]) -> StartupError:
    """The sources have the model, but not all that is needed of it."""
    names, where = ", ".join(missing), ", ".join(title(source) for source in places)
    return StartupError(
        f"{where} 上的模型不完整，{folder} 里仍缺少 {names.replace(' or ', ' 或 ')}：请换一个 --source。",
        f"The model on {where} is not complete, {folder} still lacks {names}: try another --source.", param="source")


def disk_full(folder: Path, free: int, needed: int | None = None, *, converted: int = 0) -> StartupError:
    """Sizes in bytes; ``converted``: what ``--prune`` takes of those that are ``needed``."""
    zh, en = "", ""
    if needed:
        zh, en = f"要 {readable(needed)}，", f"{readable(needed)} are needed, "
    if converted:
        zh, en = f"{zh}其中转换（--prune）要 {readable(converted)}，", f"{en}{readable(converted)} of it for --prune, "
    return StartupError(f"{folder} 所在的磁盘满了：{zh}只剩 {readable(free)}。请腾出空间再试，已下载的部分会保留。",
                        f"The disk with {folder} is full: {en}{readable(free)} are free. Make room and try again; "
                        "what was downloaded is kept.")  # fmt: skip


def interrupted(folder: Path) -> Interrupted:
    return Interrupted(f"下载中断了：已下载的都留在 {folder}（没下完的文件是 .part），下次从断开的地方接着下。",
                       f"Download interrupted: all that was downloaded stays in {folder} (a file under way ends in "
                       ".part), the next time it goes on from there.")  # fmt: skip


@contextlib.contextmanager
def disk_failures(folder: Path) -> Iterator[None]:
    """Turns the OSErrors of writing into StartupErrors."""
    try:
        yield
    except BrokenPipeError:  # the reader of what is printed has left
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise disk_full(folder, disk_free(folder)) from error
        where = f"{error.filename or folder}"
        raise StartupError(
            f"不能写入 {where}（{error.strerror}）：请检查权限、关掉占用它的程序，或把程序移到别的文件夹。",
            f"Cannot write to {where} ({error.strerror}): check its permissions, close programs that have it open, or "
            "move this program.") from error  # fmt: skip

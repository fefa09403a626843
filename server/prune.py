"""``download --prune``: the weights in the form that this machine reads, and their originals deleted.

An original goes only when the file made of it has been written, synced, opened again and read to its end with right
sums, and is still the file that was converted. Killed at any moment, this leaves a model that starts: from the
originals as long as all of them are there, afterwards from what was made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from server.adapters import check_adapters, with_prefix
from server.assembly import build_ops, progress_bar, speaker
from server.config import ROOT, Config
from server.converted import Converted, NoRoom, has_right_sums, is_same, read, whole_file
from server.download import SENTENCE, ensure_edition
from server.download.failures import disk_failures, disk_full
from server.download.folder import DEFAULT_MODEL, locate
from server.download.progress import readable
from server.download.pruned import choose_for
from server.errors import Interrupted, StartupError
from server.file_lock import folder_lock
from server.footprint import ModelShape
from server.hardware import probe

Say = Callable[[str, str], None]


def prune(config: Config, root: Path = ROOT) -> int:
    """Complete the model, convert it, delete what is not needed any more; returns the exit code.

    Raises StartupError, with nothing deleted, where the folder is not ours to delete in, or the converted file is not
    there or not right.
    """
    say = speaker(config)
    name = config.model or DEFAULT_MODEL
    if Path(name).name in SENTENCE.repositories or config.verify:
        what = ("用于句向量模型", "do for sentence models")
        if config.verify:
            what = ("和 --verify 一起用", "go with --verify")
        raise StartupError(f"--prune 不能{what[0]}：请去掉 --prune。",
                           f"--prune does not {what[1]}: leave --prune out.", param="prune")  # fmt: skip
    check_adapters(config)
    _check_place(locate(name, root, foreign=True), config, root)
    folder = ensure_edition(config, root, thorough=True)
    with disk_failures(folder), folder_lock(folder) as is_ours:
        if not is_ours:
            raise StartupError(f"另一个程序正在往 {folder} 里写：等它完成后再试。",
                               f"Another program is writing into {folder}: try again when it is done.")  # fmt: skip
        try:
            file = _convert(say, config, folder, root)
            originals = _originals(file) if file else []
            if originals:
                _check(say, file, originals)
        except KeyboardInterrupt:
            raise Interrupted("中断了：没有删除任何文件，模型照样能用。",
                              "Interrupted: nothing was deleted, the model works as before.") from None  # fmt: skip
        if originals:
            _delete(say, file, originals)
        elif file:
            say(f"没有要删的：{folder} 里只有转换好的 {file.path.name}。",
                f"There is nothing to delete: {folder} has the converted {file.path.name} alone.")
        else:
            say(f"{folder} 的权重本来就是 safetensors，直接使用，没有要删的。",
                f"The weights in {folder} are safetensors, which are used as they are: there is nothing to delete.")
    return 0


def _check_place(folder: Path, config: Config, root: Path) -> None:
    """Raises StartupError for a folder outside THUDM, unless the user wrote where it is."""
    home = root / "THUDM"
    written = config.model is not None and home.absolute() not in folder.absolute().parents
    if not written and home.resolve() not in folder.resolve().parents:
        raise StartupError(
            f"{folder} 实际在 {folder.resolve()}，不在 {home} 里，没有删除任何文件：确实要删，请写 "
            f"--model {folder.resolve()}。",
            f"{folder} is really {folder.resolve()}, not in {home}, and nothing was deleted: if that is what you want, "
            f"write --model {folder.resolve()}.", param="model")  # fmt: skip


def _convert(say: Say, config: Config, folder: Path, root: Path) -> Converted | None:
    """The file that starts with these options read, made if it is not there; None where that is the originals."""
    shape = with_prefix(ModelShape.from_folder(folder), config.ptuning)
    profile = choose_for(folder, probe(root), shape, config)
    say("转换权重……", "converting the weights ...")
    import torch

    from server.converting import NotConvertible
    from server.models.loader import convert_model

    torch.set_num_threads(profile.threads)
    try:
        with progress_bar(config, "正在转换权重", "converting the weights") as progress:
            path = convert_model(
                folder,
                dtype=getattr(torch, profile.dtype),
                bits=profile.bits,
                ops=build_ops(config, profile),
                family=config.family,
                adapted=config.lora is not None,
                progress=progress,
            )
    except NoRoom as error:
        raise disk_full(folder, error.free, error.needed) from error
    except NotConvertible as error:
        raise _refused(f"权重不能转换（{error}）", f"the weights cannot be converted ({error})") from error
    return read(path) if path else None


def _originals(file: Converted) -> list[Path]:
    """What the file was made of, and what that was made of: all that is still there, the latter first."""
    there = [path for path in file.originals if path.exists()]
    whole = read(whole_file(file.folder))
    if whole and whole.path in there:
        there = [path for path in whole.originals if path.exists()] + there
    return there


def _check(say: Say, file: Converted, originals: list[Path]) -> None:
    """Raises StartupError where anything is not as it was when it was converted."""
    for path in originals:
        source = file.sources.get(path.name) or read(whole_file(file.folder)).sources[path.name]
        if path.is_symlink():
            raise _refused(f"{path} 只是一个链接，删掉它腾不出空间", f"{path} is only a link, it takes no room")
        if not is_same(path, source):
            raise _refused(f"{path} 在转换以后改变了", f"{path} was changed since it was converted")
    say(f"核对 {file.path}……", f"checking {file.path} ...")
    if not has_right_sums(file):
        raise _refused(f"{file.path} 坏了：请删掉它再试", f"{file.path} is damaged: delete it and try again")


def _refused(zh: str, en: str) -> StartupError:
    return StartupError(f"没有删除任何文件：{zh}。", f"Nothing was deleted: {en}.", param="prune")


def _delete(say: Say, file: Converted, originals: list[Path]) -> None:
    freed = 0
    for path in originals:
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise StartupError(
                f"不能删除 {path}（{error.strerror}），已腾出 {readable(freed)}：请关掉正在使用它的程序再试。",
                f"Cannot delete {path} ({error.strerror}); {readable(freed)} were freed so far. Close the programs "
                "that use it and try again.") from error  # fmt: skip
        freed += size
    name = file.path.relative_to(file.folder).as_posix()
    left = readable(file.path.stat().st_size)
    say(f"删除了 {len(originals)} 个原来的权重文件，腾出 {readable(freed)}；留下 {name}（{left}），以后从它启动。",
        f"Deleted {len(originals)} original files of weights, {readable(freed)} were freed; from now on {name} "
        f"({left}) is used.")
    if file.path != whole_file(file.folder):
        say("换用别的位数、显卡或 LoRA 时还要用原来的权重，那时会重新下载（自己的模型要自己放回来）。",
            "Other bits, a GPU or a LoRA take the originals, which are then downloaded again (your own models' you put "
            "back).")

"""Model folders on this machine: which one is meant, and what it still lacks."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.converted import Converted, kept, read, whole_file
from server.errors import ModelError, StartupError
from server.option_types import flag

DEFAULT_MODEL = "THUDM/chatglm2-6b"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Repositories(NamedTuple):
    """What a model is called where it can be had; of several names the first one that exists counts."""

    hub: tuple[str, ...]  # on the Hugging Face Hub and its mirrors
    modelscope: tuple[str, ...] = ()  # none: its owners have not put it there


class ModelKind(NamedTuple):
    """What the folders of one kind of model have in common, beside config.json and weights."""

    option: str  # the field of Config that names such a model
    zh: str  # what such a model is called
    en: str
    repositories: Mapping[str, Repositories]  # names that can be downloaded: the folder under THUDM -> where it is had
    tokenizers: tuple[str, ...]  # one of these files is there
    extras: tuple[str, ...]  # other files worth downloading
    # which of the tokenizers will do, where config.json tells
    tokenizers_for: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None


def _chat_tokenizers(config: Mapping[str, Any]) -> tuple[str, ...]:
    return ("ice_text.model",) if "inner_hidden_size" in config else ("tokenizer.model",)  # ChatGLM-6B, or a later one


_PUBLISHED = (
    "chatglm-6b", "chatglm-6b-int8", "chatglm-6b-int4",
    "chatglm2-6b", "chatglm2-6b-int4", "chatglm2-6b-32k", "chatglm2-6b-32k-int4",
    "chatglm3-6b", "chatglm3-6b-32k", "chatglm3-6b-128k",
    "codegeex2-6b", "codegeex2-6b-int4",
)  # fmt: skip


# Zhipu AI's list of its models on ModelScope (of 2026) writes these otherwise than the Hub
_ON_MODELSCOPE = {
    "chatglm-6b": "ChatGLM-6B",
    "chatglm-6b-int8": "ChatGLM-6B-int8",
    "chatglm-6b-int4": "ChatGLM-6B-Int4",
    "chatglm2-6b-32k-int4": "ChatGLM2-6B-32k-int4",
    "codegeex2-6b-int4": "CodeGeeX2-6B-int4",
}

CHAT = ModelKind(
    "model",
    "模型",
    "model",
    {
        name: Repositories((f"THUDM/{name}", f"zai-org/{name}"), (f"ZhipuAI/{_ON_MODELSCOPE.get(name, name)}",))
        for name in _PUBLISHED
    },
    ("tokenizer.model", "ice_text.model"),
    # the tokenizer's code as the text that tells ChatGLM3 from ChatGLM2
    ("tokenizer_config.json", "tokenization_chatglm.py", "MODEL_LICENSE"),
    _chat_tokenizers,
)
SENTENCE = ModelKind(
    "embedding_model",
    "句向量模型",
    "sentence model",
    {"text2vec-large-chinese": Repositories(("GanymedeNil/text2vec-large-chinese",))},
    ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model"),
    ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "LICENSE"),
)
# git without LFS leaves notes of some 130 bytes in place of large files
_POINTER_BYTES = 1024
_OWNED = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/MODEL
_OWNER_END = "--"  # in the name of its folder
_POINTER_START = b"version https://git-lfs"
_ANY_WEIGHTS = "model.safetensors or pytorch_model.bin"  # what lacks where there are no weights at all


def locate(name: str, root: Path, kind: ModelKind = CHAT, *, foreign: bool = False) -> Path:
    """The folder that ``name`` means, which need not be there yet if the model can be downloaded.

    A bare name is looked up under ``root``/THUDM first, a path from the current folder and then from ``root``;
    OWNER/MODEL is also what was downloaded of that name, which with ``foreign`` need not be there. Raises StartupError
    with the nearest names if there is nothing of the kind.
    """
    home = root / "THUDM"
    given = Path(name).expanduser()
    places = [home / name, given] if given.name == name else [given, root / given]
    if is_foreign := bool(_OWNED.fullmatch(name)):
        places.append(home / name.replace("/", _OWNER_END))
    for place in places:
        if place.is_dir():
            return place.absolute()
        if place.is_file():
            raise _not_a_folder(place, kind)
    bare = name.rpartition("/")[2]
    if bare in kind.repositories and name in (bare, f"THUDM/{bare}", *kind.repositories[bare].hub):
        return home / bare
    if foreign and is_foreign:
        return places[-1]
    raise _unknown(name, home, kind)


def repositories(folder: Path, root: Path, kind: ModelKind = CHAT, *, anywhere: bool = False) -> Repositories | None:
    """Where the contents of a folder can be had: nowhere, unless it is one of ours, or it may be ``anywhere``.

    The folder of OWNER/MODEL is called OWNER--MODEL. On ModelScope others may have taken an owner's name, so it is for
    the user to ask that site for it.
    """
    if not anywhere and folder.resolve() != (root / "THUDM" / folder.name).resolve():
        return None
    owner, end, model = folder.name.partition(_OWNER_END)
    if folder.name not in kind.repositories and owner and end and model:
        return Repositories((f"{owner}/{model}",), (f"{owner}/{model}",))
    return kind.repositories.get(folder.name)


def is_published(folder: Path, kind: ModelKind = CHAT) -> bool:
    """Whether the folder's name is that of a model that this program knows."""
    return folder.name in kind.repositories


def missing_files(folder: Path, kind: ModelKind = CHAT, *, originals: bool = False) -> list[str]:
    """What the folder lacks to be loaded; only looks at what there is, so a damaged file is the loader's to find.

    A quantized file that was kept when its originals were deleted is all that is needed, unless ``originals`` are.
    """
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    tokenizers = _tokenizers(folder, kind)
    if not any(_has(folder, name) for name in tokenizers):
        missing += [name for name in tokenizers if (folder / name).is_file()] or [" or ".join(tokenizers)]
    return missing + ([] if kept(folder) and not originals else _missing_weights(folder))


def has_pickles(folder: Path) -> bool:
    """Whether the weights that are there, or begun, are pickles and nothing else but what was made of them here."""
    others = {*folder.glob("*.safetensors*")} - {file.path for file in converted_files(folder)}
    return any(folder.glob("pytorch_model*.bin*")) and not others


def is_superfluous(folder: Path, name: str, *, originals: bool = False) -> bool:
    """Whether the folder is complete without this file: weights, where all are there as safetensors, or converted."""
    if (folder / name).exists():
        return False
    is_weights = name.startswith(("pytorch_model", "model.safetensors", "model-"))
    if is_weights and (read(whole_file(folder)) or (kept(folder) and not originals)):
        return True
    index = folder / "model.safetensors.index.json"
    whole = not _absent_shards(folder, index) if index.is_file() else _has(folder, "model.safetensors")
    return whole and name.startswith("pytorch_model")


def converted_files(folder: Path) -> list[Converted]:
    """The files of weights that were made here and that starts rely on: their originals are not there, or not read."""
    whole = read(whole_file(folder))
    return [*([whole] if whole else []), *kept(folder).values()]


def is_begun(folder: Path) -> bool:
    """Whether a file of weights is there, or the part of one that a broken off download left."""
    parts = [*folder.glob("*.safetensors.part"), *folder.glob("pytorch_model*.bin.part")]
    return any(_has(folder, path.name) for path in [*_weights(folder), *parts])


def incomplete(folder: Path, missing: list[str], kind: ModelKind = CHAT) -> ModelError:
    """What to tell the user of a folder of their own: files that are not there, and ones that are only a note."""
    pointers = [name for name in missing if is_pointer(folder / name)]
    small = [name for name in missing if name not in pointers and (folder / name).is_file()]
    absent = [name for name in missing if name not in pointers and name not in small]
    zh, en = [], []
    if absent:
        zh.append("缺少 " + "、".join(absent).replace(" or ", " 或 "))
        en.append("lacks " + ", ".join(absent))
    if pointers:
        zh.append(f"{'、'.join(pointers)} 只是 Git LFS 的指针，不是文件本身")
        en.append(f"has only Git LFS pointers in place of {', '.join(pointers)}")
    if small:
        zh.append(f"{'、'.join(small)} 不完整")
        en.append(f"has only a damaged {', '.join(small)}")
    them = "it" if len(missing) == 1 else "them"
    if pointers:
        do_zh, do_en = "在那里执行 git lfs pull，或重新下载", f"run git lfs pull there, or download {them} again"
    elif small:
        do_zh, do_en = "重新下载", f"download {them} again"
    else:
        do_zh, do_en = "把文件放齐", f"put {them} there"
    return ModelError(f"模型文件夹 {folder} 里{'；'.join(zh)}：请{do_zh}。",
                      f"The model folder {folder} {' and '.join(en)}: {do_en}.", param=kind.option)


def is_pointer(path: Path) -> bool:
    """Whether it is what git leaves in place of a large file where LFS is missing."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER_START)) == _POINTER_START
    except OSError:
        return False


def _tokenizers(folder: Path, kind: ModelKind) -> tuple[str, ...]:
    """The tokenizer files of which the folder needs one."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # not there yet, or the loader's to complain of
        return kind.tokenizers
    return kind.tokenizers_for(config) if kind.tokenizers_for and isinstance(config, dict) else kind.tokenizers


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


def _missing_weights(folder: Path) -> list[str]:
    if read(whole_file(folder)):  # made of the shards that an index names, which need not be there
        return []
    lacking = [_absent_shards(folder, folder / index) for index in INDEXES if (folder / index).is_file()]
    if lacking:
        return min(lacking, key=len)
    if any(_has(folder, path.name) for path in _weights(folder)):
        return []
    return sorted(path.name for path in _weights(folder)) or [_ANY_WEIGHTS]


def _absent_shards(folder: Path, index: Path) -> list[str]:
    """The files that an index names and that are not there; the index itself, where it cannot be read."""
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [index.name]
    return [shard for shard in shards if not _has(folder, str(shard))]


def _has(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size > _POINTER_BYTES


def _not_a_folder(file: Path, kind: ModelKind) -> StartupError:
    folder, written = file.absolute().parent, flag(kind.option)
    return StartupError(f"{file} 是一个文件，{written} 要的是它所在的文件夹：请写 {written} {folder}。",
                        f"{file} is a file, {written} wants the folder that it is in: write {written} {folder}.",
                        param=kind.option)


def _unknown(name: str, home: Path, kind: ModelKind) -> StartupError:
    usable = (path.name for path in home.glob("*") if path.is_dir() and not missing_files(path, kind))
    there = sorted({*kind.repositories, *usable})
    spelled = {known.lower(): known for known in there}
    near = difflib.get_close_matches(name.lower().replace("\\", "/").rpartition("/")[2], spelled, n=1)
    zh, en = (f"是不是 {spelled[near[0]]}？", f" Did you mean {spelled[near[0]]}?") if near else ("", "")
    return StartupError(
        f"没有叫 {name} 的{kind.zh}：它不是文件夹，也不在 {home} 里。{zh}可用的有：{'、'.join(there)}。",
        f"There is no {kind.en} {name}: it is not a folder, and not in {home}.{en} Available: {', '.join(there)}.",
        param=kind.option,
    )

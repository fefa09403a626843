"""Reading the files of a model folder; a wrong file is refused with one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from server.errors import ModelError

_LFS_POINTER = b"version https://git-lfs.github.com/spec"


class JsonFile(dict[str, Any]):
    """A JSON object, and the file that it is of."""

    def __init__(self, content: dict[str, Any], path: Path):
        super().__init__(content)
        self.path = path


def missing(path: Path) -> ModelError:
    return ModelError(
        f"找不到模型文件 {path}；请检查模型文件夹，重新下载或重新复制这个文件。",
        f"The model file {path} is missing; check the model folder, download or copy the file again.",
    )


def damaged(path: Path, zh: str, en: str) -> ModelError:
    """``zh`` and ``en`` say what is wrong with the file."""
    return ModelError(
        f"模型文件 {path} {zh}；请重新下载或重新复制这个文件。",
        f"The model file {path} {en}; download or copy it again.",
    )


def check_file(path: Path) -> None:
    """Refuse what is saved in a model file's place when a download goes wrong."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise damaged(path, f"无法读取（{error}）", f"cannot be read ({error})") from error
    if not start:
        raise damaged(path, "是空的", "is empty")
    if start.startswith(_LFS_POINTER):
        raise damaged(
            path,
            "只是 git-lfs 的指针，不是文件本身（克隆仓库后要运行 git lfs pull）",
            "is a git-lfs pointer, not the file itself (run git lfs pull after cloning)",
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise damaged(path, "是一个网页，不是模型文件", "is a web page, not the model file")


def read_bytes(path: Path) -> bytes:
    check_file(path)
    return path.read_bytes()


def read_json(path: Path) -> JsonFile:
    """A JSON object."""
    try:
        content = json.loads(read_bytes(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(path, f"不是有效的 JSON（{error}）", f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise damaged(path, "不是一个 JSON 对象", "is not a JSON object")
    return JsonFile(content, path)


def load_sentencepiece(path: Path, more: bytes = b"") -> SentencePieceProcessor:
    """``more``: serialized fields of a ModelProto, which protobuf takes as if they stood in the file."""
    content = read_bytes(path) + more
    try:
        # from memory: sentencepiece itself cannot open a path with Chinese characters on Windows
        return SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError) as error:
        raise damaged(path, "不是有效的分词模型", "is not a valid sentencepiece model") from error

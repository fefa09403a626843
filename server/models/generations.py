"""Which generation a checkpoint folder is of, told from config.json and the tokenizer's files.

config.json alone does not say it: ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 have the same fields. What is looked at, the
strongest evidence first:

1. fields of config.json: model_type chatglm, and ChatGLM-6B's or those of the block that came with ChatGLM2;
2. what other models have: VisualGLM's fields, GLM-4's tokenizer and vocabulary;
3. role tokens in the tokenizer's files, which ChatGLM3 alone has; its code without them is not ChatGLM3's;
4. tokenizer.model itself: CodeGeeX2's, or the one that ChatGLM2 and ChatGLM3 share;
5. two of the three fields in which CodeGeeX2's config.json differs, since one is easily changed (many convert ChatGLM2
   to bfloat16);
6. names: where the checkpoint was made from, its folder's, its tokenizer's;
7. ChatGLM2 if nothing says otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from server.errors import ModelError

AUTO = "auto"
CHATGLM, CHATGLM2, CHATGLM3, CODEGEEX2 = "chatglm", "chatglm2", "chatglm3", "codegeex2"
TITLES = {CHATGLM: "ChatGLM-6B", CHATGLM2: "ChatGLM2", CHATGLM3: "ChatGLM3", CODEGEEX2: "CodeGeeX2"}

_CODE = "tokenization_chatglm.py"  # the official tokenizer, which is read here and never run
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (_CODE, _TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
_ROLE = "<|user|>"
_SHA256 = {
    "57d9fdbdfaa7cd8c0a3a38d7e8de2e6c31374b5dbc4dc4568d85585fe745812f": True,  # CodeGeeX2's
    "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2": False,  # that of ChatGLM2 and ChatGLM3
}
_TOKENIZER_SIZE = 1_018_370  # bytes of either
_CODEGEEX2_FIELDS = {"torch_dtype": "bfloat16", "rotary_percent": 0.5, "interleaved_qkv": False}
_GLM4_VOCABULARY = 151552
_NAMED = re.compile(r"glm[-_ ]?(?P<chatglm>[23])(?!\d)|codegeex[-_ ]?(?P<codegeex>2)(?!\d)")
_SHOWN = 40  # characters of a field's value
_FIELDS = ("model_type", "padded_vocab_size", "multi_query_attention", "inner_hidden_size", "position_encoding_2d")


class Told(NamedTuple):
    """The name of the family that a checkpoint is of, None if it is of none; ``guessed`` where nothing said it."""

    family: str | None
    guessed: bool = False


def generation(config: Mapping[str, Any], folder: Path) -> str | None:
    """The name of the family that the checkpoint is of, or None if it is of none."""
    return tell(config, folder).family


def tell(config: Mapping[str, Any], folder: Path) -> Told:
    """``generation``, and whether only the last rule decided."""
    if _model_type(config) != "chatglm" or _other_model(config, folder):
        return Told(None)
    if "inner_hidden_size" in config and "position_encoding_2d" in config:
        return Told(CHATGLM)
    if "padded_vocab_size" not in config or "multi_query_attention" not in config:
        return Told(None)
    texts = {name: _text(folder / name) for name in _TOKENIZER_FILES}
    if any(_ROLE in text for text in texts.values()):
        return Told(CHATGLM3)
    possible = {CHATGLM2, CHATGLM3, CODEGEEX2}
    if texts[_CODE]:
        possible.discard(CHATGLM3)
    codegeex2 = _has_codegeex2_tokenizer(folder / "tokenizer.model")
    if codegeex2 is None and sum(config.get(name) == value for name, value in _CODEGEEX2_FIELDS.items()) >= 2:
        codegeex2 = True
    if codegeex2:
        return Told(CODEGEEX2)
    if codegeex2 is False:
        possible.discard(CODEGEEX2)
    names = (config.get("_name_or_path"), folder.absolute().name, _tokenizer_config(folder).get("name_or_path"))
    found = next((found for found in map(_named, names) if found in possible), None)
    return Told(found or CHATGLM2, guessed=found is None and len(possible) > 1)


def tell_folder(folder: Path) -> Told:
    """Of none where config.json cannot be read."""
    config = _config(folder)
    return Told(None) if config is None else tell(config, folder)


def check_folder(folder: Path, named: str = AUTO) -> None:
    """Raises ModelError for a folder of another model, or one that cannot be of the family ``named`` by the user.

    One that cannot be told because of its config.json passes.
    """
    config = _config(folder)
    if config is None:
        return
    told = generation(config, folder)
    if named == AUTO and told is None:
        raise unknown_model(config, folder)
    # the others differ in what a user may know better; ChatGLM-6B's network and tokenizer are its own
    if named != AUTO and told and (named == CHATGLM) != (told == CHATGLM):
        raise ModelError(
            f"模型文件夹 {folder} 里是 {TITLES[told]}，不能用 --family {named}：请去掉 --family。",
            f"The model folder {folder} holds {TITLES[told]}, --family {named} is not possible: leave --family out.",
            param="family",
        )


def unknown_model(config: Mapping[str, Any], folder: Path) -> ModelError:
    """For a checkpoint that is of no family: which fields were looked at, and what to do."""
    path, names = folder / "config.json", ", ".join((CHATGLM, CHATGLM2, CHATGLM3, CODEGEEX2))
    values = _looked_at(config, folder)
    there = {name: repr(value)[:_SHOWN] for name, value in values.items() if value is not None}
    missing = [name for name, value in values.items() if value is None]
    found_zh = "，".join([*(f"{k} 是 {v}" for k, v in there.items()), *(f"没有 {name}" for name in missing)])
    found_en = ", ".join([*(f"{k} is {v}" for k, v in there.items()), *(f"{name} is missing" for name in missing)])
    other = _other_model(config, folder)
    zh, en = (f"更像 {other}，", f" and looks like {other}") if other else ("", "")
    return ModelError(
        f"{path} 不是本程序支持的模型（{names}），{zh}看过的字段：{found_zh}；"
        "请换其中一种的官方模型文件夹，如果它确实是其中一种，请用 --family 指明。",
        f"{path} is none of the supported models ({names}){en}: {found_en}; use an official folder of one of them, or "
        "name the family with --family if it is one after all.",
        param="family",
    )


def _other_model(config: Mapping[str, Any], folder: Path) -> str:
    """The name of a model that resembles one of the family and is none, or ""."""
    if _model_type(config).startswith("glm"):
        return "GLM"
    if "eva_config" in config or "qformer_config" in config:
        return "VisualGLM"
    if "padded_vocab_size" not in config:
        return ""
    glm4 = config["padded_vocab_size"] == _GLM4_VOCABULARY or "ChatGLM4Tokenizer" in str(_tokenizer_config(folder))
    return "GLM-4" if glm4 or "tiktoken" in _text(folder / _CODE) else ""


def _model_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type") or "chatglm")


def _looked_at(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields that tell whether it is one of the family, with their values; None for one that is not there."""
    kind = _tokenizer_config(folder).get("tokenizer_class")
    extra = [name for name in ("eva_config", "qformer_config") if name in config]
    return {name: config.get(name) for name in (*_FIELDS, *extra)} | ({"tokenizer_class": kind} if kind else {})


def _has_codegeex2_tokenizer(path: Path) -> bool | None:
    """None where it is neither CodeGeeX2's nor ChatGLM2's."""
    if not path.is_file() or path.stat().st_size != _TOKENIZER_SIZE:
        return None
    return _SHA256.get(hashlib.sha256(path.read_bytes()).hexdigest())


def _named(name: Any) -> str | None:
    """The one generation that a name names."""
    found = {f"{match.lastgroup}{match[0][-1]}" for match in _NAMED.finditer(str(name).lower())}
    return found.pop() if len(found) == 1 else None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read: the tokenizer works without it."""
    try:
        content = json.loads(_text(folder / _TOKENIZER_CONFIG))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _config(folder: Path) -> dict[str, Any] | None:
    """None where config.json is missing or cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""

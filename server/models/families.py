"""The model families that this program knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.errors import ModelError
from server.models.base import Family
from server.models.chatglm.prompt import ChatGLM
from server.models.chatglm2.codegeex2 import CodeGeeX2
from server.models.chatglm2.prompt import ChatGLM2, ChatGLM3
from server.models.generations import AUTO, unknown_model


def families() -> tuple[Family, ...]:
    return ChatGLM2(), ChatGLM3(), CodeGeeX2(), ChatGLM()


def find_family(config: Mapping[str, Any], folder: Path, name: str = AUTO) -> Family:
    """The family that this checkpoint is of, or the one that the user names.

    Raises ModelError where none fits, or no family has that name.
    """
    known = families()
    chosen = [f for f in known if (f.matches(config, folder) if name == AUTO else f.name == name)]
    if chosen:
        return chosen[0]
    names = ", ".join(f.name for f in known)
    if name != AUTO:
        raise ModelError(
            f"没有名为 {name!r} 的模型系列；可选：{AUTO}, {names}。",
            f"There is no model family {name!r}; choose one of {AUTO}, {names}.",
            param="family",
        )
    raise unknown_model(config, folder)

"""Reading config.json strictly: a field is there with a possible value, or the error names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from server.errors import ModelError

T = TypeVar("T", int, float)
_MISSING = object()


def number(config: Mapping[str, Any], name: str, kind: type[T], *, default: T | None = None) -> T:
    """A positive number of the given type; a missing one is an error unless there is a default."""
    value = _field(config, name, _MISSING if default is None else default)
    allowed = (int,) if kind is int else (int, float)
    wanted = ("正整数", "a positive whole number") if kind is int else ("正数", "a positive number")
    require(config, name, type(value) in allowed and value > 0, *wanted)
    return kind(value)


def flag(config: Mapping[str, Any], name: str) -> bool:
    value = _field(config, name, _MISSING)
    require(config, name, isinstance(value, bool), "true 或 false", "true or false")
    return value


def require(config: Mapping[str, Any], name: str, holds: bool, zh: str, en: str = "") -> None:
    """Raises ModelError naming the field and its value where ``holds`` is False; ``zh`` and ``en`` say what it must be.

    One text is enough where it is the same in both languages.
    """
    if not holds:
        value, file = config.get(name), _file(config)
        gap = " " if zh[0].isascii() else ""
        raise ModelError(
            f"{file} 的 {name} 是 {value!r}，应为{gap}{zh}；这个模型文件夹无法使用，请换官方的 config.json。",
            f"{file}: {name} is {value!r}, it must be {en or zh}; use the model's official config.json.",
            param=name,
        )


def _file(config: Mapping[str, Any]) -> str:
    """Its path, where it was read by ``files.read_json``."""
    return str(getattr(config, "path", "config.json"))


def _field(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if value is _MISSING:
        raise ModelError(
            f"{_file(config)} 里没有 {name}；这不是完整的 ChatGLM 配置，请换官方的 config.json。",
            f"{_file(config)} has no {name}: it is not a complete ChatGLM configuration; use the model's official one.",
            param=name,
        )
    return value

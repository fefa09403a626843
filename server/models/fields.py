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
    require(config, name, type(value) in allowed and value > 0, f"a positive {kind.__name__}")
    return kind(value)


def flag(config: Mapping[str, Any], name: str) -> bool:
    value = _field(config, name, _MISSING)
    require(config, name, isinstance(value, bool), "true or false")
    return value


def require(config: Mapping[str, Any], name: str, holds: bool, wanted: object) -> None:
    """Raises ModelError naming the field and its value where ``holds`` is False."""
    if not holds:
        value = config.get(name)
        raise ModelError(
            f"config.json 的 {name} 是 {value!r}，应为 {wanted}；这个模型文件夹无法使用，请换官方的 config.json。",
            f"config.json: {name} is {value!r}, it must be {wanted}; use the model's official config.json.",
            param=name,
        )


def _field(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if value is _MISSING:
        raise ModelError(
            f"config.json 里没有 {name}；这不是完整的 ChatGLM 配置，请换官方的 config.json。",
            f"config.json has no {name}: it is not a complete ChatGLM configuration; use the model's official one.",
            param=name,
        )
    return value

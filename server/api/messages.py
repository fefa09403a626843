"""pydantic's errors as our own sentences: which field and position, what is allowed, what was given."""

from __future__ import annotations

import json
from typing import Any

import annotated_types
from pydantic import BaseModel

from server.errors import BadRequest

SHOWN = 40  # characters of a given text

STRING = ("字符串", "a string")
INTEGER = ("整数", "a whole number")
NUMBER = ("数", "a number")
BOOLEAN = (" true 或 false", "true or false")
ARRAY = ("数组", "an array")

EXPECTED = {
    "string_type": STRING,
    "int_type": INTEGER,
    "int_parsing": INTEGER,
    "int_parsing_size": INTEGER,
    "int_from_float": INTEGER,
    "float_type": NUMBER,
    "float_parsing": NUMBER,
    "finite_number": NUMBER,
    "greater_than": NUMBER,
    "greater_than_equal": NUMBER,
    "less_than": NUMBER,
    "less_than_equal": NUMBER,
    "bool_type": BOOLEAN,
    "bool_parsing": BOOLEAN,
    "list_type": ARRAY,
}


def field_error(model: type[BaseModel], error: dict[str, Any]) -> BadRequest:
    """The sentence for one of pydantic's error details about ``model``."""
    location = error["loc"]
    where = "".join(f"[{step}]" if isinstance(step, int) else f"{step}" for step in location)
    zh, en = _sentences(model, error, where)
    return BadRequest(zh, en, param=str(location[0]) if location else None)


def _sentences(model: type[BaseModel], error: dict[str, Any], where: str) -> tuple[str, str]:
    kind = error["type"]
    if kind == "missing":
        return f"缺少字段 {where}。", f"The field {where} is missing."
    if kind == "sentence":  # made by our own validators, complete but for the place
        return f"{where}：{error['ctx']['zh']}", f"{where}: {error['ctx']['en']}"
    if kind == "string_unicode":
        return f"{where} 中有半个代理对字符。", f"{where} holds half of a surrogate pair."
    if kind not in EXPECTED:
        return f"{where} 无效：{error['msg']}。", f"{where} is not valid: {error['msg']}."
    expected_zh, expected_en = EXPECTED[kind]
    range_zh, range_en = _range(model, error["loc"])
    given_zh, given_en = _given(error["input"])
    return (
        f"{where} 应为{range_zh}{expected_zh}，收到的是{given_zh}。",
        f"{where} must be {expected_en}{range_en}, but {given_en} was given.",
    )


def _range(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[str, str]:
    """What the declaration of a number's field allows, to be put before the Chinese and behind the English noun."""
    zh, en = [], []
    for rule in model.model_fields[str(location[0])].metadata if len(location) == 1 else ():
        if isinstance(rule, annotated_types.Gt):
            zh.append(f"大于 {rule.gt}")
            en.append(f"more than {rule.gt}")
        elif isinstance(rule, annotated_types.Ge):
            zh.append(f"不小于 {rule.ge}")
            en.append(f"at least {rule.ge}")
        elif isinstance(rule, annotated_types.Le):
            zh.append(f"不大于 {rule.le}")
            en.append(f"at most {rule.le}")
    return ("、".join(zh) + " 的", " of " + " and ".join(en)) if zh else ("", "")


def _given(value: Any) -> tuple[str, str]:
    if isinstance(value, dict):
        return "一个对象", "an object"
    if isinstance(value, list):
        return "一个数组", "an array"
    text = value[:SHOWN] + "…" if isinstance(value, str) and len(value) > SHOWN else value
    shown = json.dumps(text, ensure_ascii=False)
    if not isinstance(value, str) and len(shown) > SHOWN:
        shown = shown[:SHOWN] + "…"
    return f" {shown}", shown

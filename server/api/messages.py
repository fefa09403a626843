"""pydantic's errors as our own sentences: which field and position, what is allowed, what was given."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from server.errors import BadRequest

SHOWN = 40  # characters of a given text

STRING = ("字符串", "a string")
INTEGER = ("整数", "a whole number")
NUMBER = ("数", "a number")
BOOLEAN = (" true 或 false", "true or false")
ARRAY = ("数组", "an array")
OBJECT = ("对象", "an object")

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
    "less_than_equal": NUMBER,
    "bool_type": BOOLEAN,
    "bool_parsing": BOOLEAN,
    "list_type": ARRAY,
    "dict_type": OBJECT,
    "model_type": OBJECT,
    "model_attributes_type": OBJECT,
}

# how pydantic calls a limit, and how we do
LIMITS = {
    "gt": ("大于 {}", "more than {}"),
    "ge": ("不小于 {}", "at least {}"),
    "le": ("不大于 {}", "at most {}"),
}

# what json.loads finds wrong; texts that differ between Pythons are left out
JSON_REASONS = {
    "Expecting value": "应有一个值",
    "Expecting property name enclosed in double quotes": "应有用双引号括起来的键",
    "Expecting ',' delimiter": "少了逗号或结尾的括号",
    "Expecting ':' delimiter": "键的后面少了冒号",
    "Extra data": "在结束之后还有内容",
    "Unterminated string starting at": "开始的字符串没有结尾的引号",
    "Invalid control character at": "的字符串里有换行之类的字符，应写成 \\n 之类",
}

Sentence = tuple[str, str]  # Chinese and English


def json_reason(message: str) -> str:
    """In Chinese, what json.loads says of the place of an error."""
    return JSON_REASONS.get(message, "")


def field_error(model: type[BaseModel], error: dict[str, Any]) -> BadRequest:
    """The sentence for one of pydantic's error details about ``model``."""
    location = error["loc"]
    where = place(location)
    about_key = location[-1:] == ("[key]",)
    subject = (f"{where} 的键", f"a key of {where}") if about_key else (where, where)
    zh, en = _sentences(model, error, subject)
    return BadRequest(zh, en, param=where or None)


def place(location: tuple[str | int, ...]) -> str:
    """Where in the request something is: ``messages[0].content``."""
    steps = location[:-2] if location[-1:] == ("[key]",) else location
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:SHOWN]}" for step in steps)
    return text.removeprefix(".")


def _sentences(model: type[BaseModel], error: dict[str, Any], subject: Sentence) -> Sentence:
    kind, context = error["type"], error.get("ctx", {})
    zh, en = subject
    if kind == "missing":
        return f"缺少字段 {zh}。", f"The field {en} is missing."
    if kind == "sentence":  # made by our own validators, complete but for the place
        return f"{zh}：{context['zh']}", f"{en}: {context['en']}"
    if kind == "string_unicode":
        return f"{zh} 中有半个代理对字符。", f"{en} holds half of a surrogate pair."
    if kind in ("too_short", "too_long"):
        return _wrong_count(subject, context)
    expected = _expected(model, error)
    if not expected:
        return f"{zh} 无效：{error['msg']}。", f"{en} is not valid: {error['msg']}."
    given_zh, given_en = _given(error["input"])
    return f"{zh} 应为{expected[0]}，收到的是{given_zh}。", f"{en} must be {expected[1]}, but {given_en} was given."


def _expected(model: type[BaseModel], error: dict[str, Any]) -> Sentence | None:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "expected":  # from our own validators
        return context["zh"], context["en"]
    if kind == "literal_error":
        choices = context["expected"]
        return " " + choices.replace(", ", "、").replace(" or ", " 或 "), choices
    if kind not in EXPECTED:
        return None
    zh, en = EXPECTED[kind]
    range_zh, range_en = _range(model, error)
    return range_zh + zh, en + range_en


def _range(model: type[BaseModel], error: dict[str, Any]) -> Sentence:
    """What is allowed of a number, to be put before the Chinese and behind the English noun."""
    if len(error["loc"]) == 1:
        limits = _declared_limits(model, str(error["loc"][0]))
    else:  # inside a list or an object: the limit that was missed
        limits = [(name, error["ctx"][name]) for name in LIMITS if name in error.get("ctx", {})]
    zh = "、".join(LIMITS[name][0].format(_number(limit)) for name, limit in limits)
    en = " and ".join(LIMITS[name][1].format(_number(limit)) for name, limit in limits)
    return (f"{zh} 的", f" of {en}") if limits else ("", "")


def _declared_limits(model: type[BaseModel], field: str) -> list[tuple[str, float]]:
    rules = model.model_fields[field].metadata
    return [(name, getattr(rule, name)) for rule in rules for name in LIMITS if hasattr(rule, name)]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _wrong_count(subject: Sentence, context: dict[str, Any]) -> Sentence:
    zh, en = f"{subject[0]} 有 {context['actual_length']} 项", f"{subject[1]} has {context['actual_length']} elements"
    if "min_length" in context:
        return f"{zh}，至少要有 {context['min_length']} 项。", f"{en}; it needs at least {context['min_length']}."
    return f"{zh}，最多允许 {context['max_length']} 项。", f"{en}; at most {context['max_length']} are allowed."


def _given(value: Any) -> Sentence:
    if isinstance(value, dict):
        return "一个对象", "an object"
    if isinstance(value, list):
        return "一个数组", "an array"
    text = value[:SHOWN] + "…" if isinstance(value, str) and len(value) > SHOWN else value
    shown = json.dumps(text, ensure_ascii=False)
    if not isinstance(value, str) and len(shown) > SHOWN:
        shown = shown[:SHOWN] + "…"
    return f" {shown}", shown

"""From the bytes of a request to a dialect's fields: decoding, JSON, pydantic, and the types that dialects share."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from flask import Request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from server.api.messages import field_error, json_reason
from server.core import Message
from server.errors import BadRequest

AnyFields = TypeVar("AnyFields", bound="Fields")
Element = TypeVar("Element")

# every list is one: a million wrong elements would take seconds, and the first is the one to name
Array = Annotated[list[Element], Field(fail_fast=True)]


class Fields(BaseModel):
    """Base of every dialect's fields: unknown ones are ignored, and null stands for a field that is not there."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):  # something else in place of a nested object
            return values
        return {name: value for name, value in values.items() if value is not None}


class NoFields(Fields):
    pass


def _refuse_bool(error_type: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(error_type)
        return value

    return BeforeValidator(check)


# Numbers also come as numeric strings, which pydantic reads; True is an int for Python, but not here.
WholeNumber = Annotated[int, _refuse_bool("int_type")]
Number = Annotated[float, _refuse_bool("float_type")]


def _whole(text: str) -> str:
    # json.loads makes a lone surrogate of "\ud83d", which nobody behind us could encode
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticKnownError("string_unicode") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("expected", "{en}", {"zh": "字符串或字符串数组", "en": "a string or an array of strings"})


def texts(*, least: int = 0, most: int) -> Any:
    """The type of a field that takes a text or an array of ``least`` to ``most`` of them, as a list."""
    many = Annotated[Array[Text], Field(min_length=least, max_length=most)]
    return Annotated[many, BeforeValidator(_listed, json_schema_input_type=str | many)]


def _from_text(value: Any) -> Any:
    """``GET /generate`` carries its history as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except BadRequest as error:
        raise PydanticCustomError("sentence", "{en}", {"zh": error.zh, "en": error.en}) from error


def _even(texts: list[str]) -> list[str]:
    if texts and len(texts) % 2 == 0:
        return texts
    raise PydanticCustomError(
        "sentence",
        "{en}",
        {
            "zh": f"应成对给出问题和回答，收到的是 {len(texts)} 个元素。",
            "en": f"questions and answers are expected in pairs, but there are {len(texts)} elements.",
        },
    )


def _pairs(rounds: list[list[str]]) -> list[list[str]]:
    """GLM-API's TypeScript client sends ``[[q1, a1, q2, a2]]``: consecutive rounds."""
    return [texts[i : i + 2] for texts in rounds for i in range(0, len(texts), 2)]


_EVEN_SCHEMA = WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 2})
_Rounds = Annotated[Array[Text], AfterValidator(_even), _EVEN_SCHEMA]
History = Annotated[Array[_Rounds], BeforeValidator(_from_text), AfterValidator(_pairs)]


def conversation(history: list[list[str]], query: str) -> tuple[Message, ...]:
    """The messages of a validated history and a new question."""
    roles = ("user", "assistant")
    past = tuple(Message(role, text) for turn in history for role, text in zip(roles, turn, strict=True))
    return (*past, Message("user", query))


def read_fields(request: Request) -> dict[str, Any]:
    """The query parameters of a GET, and the body's JSON object for any method, whatever its Content-Type says.

    Raises BadRequest for a body that is no JSON object; werkzeug's RequestEntityTooLarge passes through.
    """
    fields = _query_parameters(request) if request.method in ("GET", "HEAD") else {}
    text = decode_text(request.get_data(cache=False))
    if text.strip():
        body = parse_json(text)
        if not isinstance(body, dict):
            raise BadRequest("请求体应为一个 JSON 对象 {...}。", "The body must be one JSON object {...}.")
        fields.update(body)
    return fields


def _query_parameters(request: Request) -> dict[str, str]:
    # not request.args: a browser or curl on a Chinese Windows may send GBK bytes
    pairs = parse_qsl(request.query_string.decode("latin-1"), encoding="latin-1")
    return {decode_text(name.encode("latin-1")): decode_text(value.encode("latin-1")) for name, value in pairs}


def decode_text(data: bytes) -> str:
    """UTF-8 with or without its BOM, else GBK (old Windows clients); raises BadRequest if it is neither."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            return data.decode("gb18030")  # GBK and what was added to it
        except UnicodeDecodeError:
            raise BadRequest("请求既不是 UTF-8 也不是 GBK 编码。", "The request is neither UTF-8 nor GBK.") from None


def parse_json(text: str) -> Any:
    """Strict JSON; raises BadRequest that says where it is wrong."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"JSON 有误：第 {error.lineno} 行第 {error.colno} 列附近{json_reason(error.msg)}。",
            f"The JSON is malformed at line {error.lineno}, column {error.colno}: {error.msg}.",
        ) from error
    except RecursionError:
        raise BadRequest("JSON 嵌套过深。", "The JSON is nested too deeply.") from None
    except ValueError:  # int() refuses more than 4300 digits
        raise BadRequest("JSON 中有位数过多的整数。", "The JSON holds an integer with too many digits.") from None


def _finite(literal: str) -> float:
    value = float(literal)
    if value in (float("inf"), float("-inf")):
        raise BadRequest(f"JSON 中的数 {literal[:40]} 过大。", f"The number {literal[:40]} in the JSON is too large.")
    return value


def _no_constant(literal: str) -> float:
    raise BadRequest(f"JSON 中不能有 {literal}。", f"{literal} is not allowed in JSON.")


def validate(model: type[AnyFields], fields: dict[str, Any]) -> AnyFields:
    """The fields as ``model`` declares them; raises BadRequest with one sentence about the first wrong one."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise field_error(model, error.errors(include_url=False)[0]) from error

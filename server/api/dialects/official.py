"""The protocol of api.py in the official repositories of ChatGLM-6B and ChatGLM2-6B, and of CodeGeeX2's
demo/fastapicpu.py: one route, no stream.

A failure has the keys of an answer, empty, the HTTP status in "status", and a "message" behind them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from flask import Response
from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.dialect import Call, Dialect, Route, json_response
from server.api.fields import Fields, History, Number, Text, WholeNumber, conversation
from server.api.language_tags import SPELLINGS, language_tag, near
from server.api.messages import SHOWN
from server.api.streaming import ask, with_request_id
from server.core import GenerationRequest, Overflow, SamplingParams
from server.errors import GenerationFailed, Overloaded, ServerError

_NO_TAG = "None"  # as CodeGeeX2's clients say that there is to be none
_CODE_DEFAULTS = {"max_length": 128, "top_p": 0.95, "temperature": 0.2}  # CodeGeeX2's


def _known_language(name: str) -> str:
    if name in ("", _NO_TAG) or language_tag(name):
        return name
    names = near(name) or ["Python", "C++", "Java", "JavaScript", "Go"]
    raise PydanticCustomError(
        "sentence",
        "{en}",
        {
            "zh": f"没有语言 {name[:SHOWN]!r} 的标签；请写 {'、'.join(names)} 等，不要标签就写 {_NO_TAG}。",
            "en": f"there is no tag for the language {name[:SHOWN]!r}; write {', '.join(names)} or another one, or "
            f"{_NO_TAG} for no tag.",
        },
    )


_LANGUAGES = WithJsonSchema({"type": "string", "enum": ["", _NO_TAG, *SPELLINGS]})
Language = Annotated[Text, AfterValidator(_known_language), _LANGUAGES]


class ChatFields(Fields):
    prompt: Text = Field(description="the question")
    history: History = Field([], description="earlier rounds, [[question, answer], ...]; the oldest are dropped first")
    max_length: WholeNumber = Field(2048, ge=1, description="tokens of prompt and answer; capped by the server's limit")
    top_p: Number = Field(0.7, ge=0, le=1, description="nucleus sampling; 0 leaves only the best token, 1 is off")
    temperature: Number = Field(0.95, ge=0, le=2, description="0 always takes the best token")
    lang: Language = Field(
        "",
        description="for CodeGeeX2: the language whose tag is put in front of the prompt; the defaults are then "
        "max_length 128, top_p 0.95, temperature 0.2",
    )
    top_k: WholeNumber = Field(0, ge=0, description="with lang: this many of the likeliest tokens; 0 is off")


def chat(call: Call, fields: ChatFields) -> Response:
    """The whole answer to the prompt, and the history with this round behind it."""
    tag = language_tag(fields.lang)
    prompt = f"{tag}\n{fields.prompt}" if tag else fields.prompt
    request = GenerationRequest(
        messages=conversation(fields.history, prompt),
        overflow=Overflow.REFUSE if fields.lang else Overflow.DROP_OLDEST,
        params=_sampling(fields, call.engine.max_length),
        client=call.client,
    )
    answer = ask(call, request)
    text = answer.read_all()
    if answer.error:
        raise answer.error
    body = _body(text, [*fields.history, [prompt, text]], 200)
    return with_request_id(json_response(body | ({"lang": fields.lang} if fields.lang else {})), answer)


def _sampling(fields: ChatFields, limit: int) -> SamplingParams:
    """The request's settings, with a language CodeGeeX2's own where the request has none."""
    names = ("temperature", "top_p", "max_length", *(("top_k",) if fields.lang else ()))
    values = {name: getattr(fields, name) for name in names}
    if fields.lang:
        values |= {name: value for name, value in _CODE_DEFAULTS.items() if name not in fields.model_fields_set}
    return SamplingParams(**values | {"max_length": min(values["max_length"], limit)})


def _body(response: str, history: list[list[str]], status: int) -> dict[str, Any]:
    return {"response": response, "history": history, "status": status, "time": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}


def error_body(error: ServerError, language: str) -> dict[str, Any]:
    return {**_body("", [], error.status), "message": error.text(language)}


_EXAMPLE = {"response": "你好！", "history": [["你好", "你好！"]], "status": 200, "time": "2023-07-01 12:34:56"}

DIALECT = Dialect(
    name="official api.py",
    routes=(
        Route(
            "/",
            ("POST",),
            ChatFields,
            chat,
            example={"prompt": "你好", "history": []},
            answers={"application/json": _EXAMPLE},
            failures=(Overloaded, GenerationFailed),
        ),
    ),
    error_body=error_body,
    about=__doc__,
)

"""The protocol of api.py in the official repositories of ChatGLM-6B and ChatGLM2-6B: one route, no stream.

A failure has the keys of an answer, empty, the HTTP status in "status", and a "message" behind them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from flask import Response
from pydantic import Field

from server.api.dialect import Call, Dialect, Route, json_response
from server.api.fields import Fields, History, Number, Text, WholeNumber, conversation
from server.api.streaming import ask, with_request_id
from server.core import GenerationRequest, Overflow, SamplingParams
from server.errors import GenerationFailed, Overloaded, ServerError


class ChatFields(Fields):
    prompt: Text = Field(description="the question")
    history: History = Field([], description="earlier rounds, [[question, answer], ...]; the oldest are dropped first")
    max_length: WholeNumber = Field(2048, ge=1, description="tokens of prompt and answer; capped by the server's limit")
    top_p: Number = Field(0.7, ge=0, le=1, description="nucleus sampling; 0 leaves only the best token, 1 is off")
    temperature: Number = Field(0.95, ge=0, le=2, description="0 always takes the best token")


def chat(call: Call, fields: ChatFields) -> Response:
    """The whole answer to the prompt, and the history with this round behind it."""
    params = SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        max_length=min(fields.max_length, call.engine.max_length),
    )
    request = GenerationRequest(
        messages=conversation(fields.history, fields.prompt),
        overflow=Overflow.DROP_OLDEST,
        params=params,
        client=call.client,
    )
    answer = ask(call, request)
    text = answer.read_all()
    if answer.error:
        raise answer.error
    return with_request_id(json_response(_body(text, [*fields.history, [fields.prompt, text]], 200)), answer)


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

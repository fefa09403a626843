"""ChatGLM-web-stream-demo's HTTP protocol.

A failure has the keys of /chat's answer, empty, with "success": false, and a "message" behind them. An answer that
fails on the way, like one that is interrupted, ends with the usual finished event, whose history has what there is;
"success": false and the "message" stand behind its keys.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from flask import Response
from pydantic import Field

from server.api.dialect import Call, Dialect, Route, json_response
from server.api.fields import Fields, History, NoFields, Text, WholeNumber, conversation
from server.api.streaming import Answer, ask, sse, stream_response, with_request_id
from server.core import GenerationRequest, Overflow
from server.errors import GenerationFailed, Overloaded, ServerError

SHOWN_ROUNDS = 5  # of the history, to the model
OK = {"success": True}

log = logging.getLogger(__name__)


class ChatFields(Fields):
    query: Text = Field(description="the question")
    history: History = Field(
        [], description=f"earlier rounds, [[question, answer], ...]; the model is shown the last {SHOWN_ROUNDS}"
    )


class ScoreFields(Fields):
    score: WholeNumber = Field(description="what the user thinks of the answer, a whole number")


def chat(call: Call, fields: ChatFields) -> Response:
    """The whole answer to the query, and the history with this round behind it."""
    answer = _ask(call, fields)
    text = answer.read_all()
    if answer.error:
        raise answer.error
    body = {"query": fields.query, "response": text, "history": _history(fields, text), "success": True}
    return with_request_id(json_response(body), answer)


def stream(call: Call, fields: ChatFields) -> Response:
    """The answer while it is made, as server-sent events named delta: what is new, and the answer so far.

    The last one says finished and has the history with this round behind it.
    """
    answer = _ask(call, fields)

    def events() -> Iterator[bytes]:
        for delta in answer.deltas():
            if delta or not answer.final:
                yield sse({"delta": delta, "response": answer.text, "finished": False}, event="delta")
        if answer.final:
            yield sse(_finished(call, fields, answer), event="delta")

    return stream_response(events(), answer)


def _ask(call: Call, fields: ChatFields) -> Answer:
    messages = conversation(fields.history[-SHOWN_ROUNDS:], fields.query)
    return ask(call, GenerationRequest(messages=messages, overflow=Overflow.DROP_OLDEST, client=call.client))


def _history(fields: ChatFields, text: str) -> list[list[str]]:
    return [*fields.history, [fields.query, text]]


def _finished(call: Call, fields: ChatFields, answer: Answer) -> dict[str, Any]:
    return {
        "query": fields.query,
        "delta": "[EOS]",
        "response": answer.text,
        "history": _history(fields, answer.text),
        "finished": True,
        **(_failure(answer.error, call.language) if answer.error else {}),
    }


def clear(call: Call, fields: NoFields) -> Response:
    """Free the memory that only makes later answers faster; running answers go on."""
    call.engine.free_caches()
    return json_response(OK)


def score(call: Call, fields: ScoreFields) -> Response:
    """Write the score into the server's log."""
    log.info("score %d from %s", fields.score, call.client)
    return json_response(OK)


def _failure(error: ServerError, language: str) -> dict[str, Any]:
    return {"success": False, "message": error.text(language)}


def error_body(error: ServerError, language: str) -> dict[str, Any]:
    return {"query": "", "response": "", "history": [], **_failure(error, language)}


def has_query(fields: dict[str, Any]) -> bool:
    """has `query`"""
    return "query" in fields


def has_query_and_history_alone(fields: dict[str, Any]) -> bool:
    """has exactly `query` and `history`"""
    return set(fields) == {"query", "history"}


_QUESTION = {"query": "你好", "history": [["1+1=?", "2"]]}
_HISTORY = [["1+1=?", "2"], ["你好", "你好！"]]
_EVENTS = (
    {"delta": "你好", "response": "你好", "finished": False},
    {"query": "你好", "delta": "[EOS]", "response": "你好！", "history": _HISTORY, "finished": True},
)

DIALECT = Dialect(
    name="web-stream",
    routes=(
        Route(
            "/chat",
            ("GET", "POST"),
            ChatFields,
            chat,
            has_query,
            example=_QUESTION,
            answers={
                "application/json": {"query": "你好", "response": "你好！", "history": _HISTORY, "success": True},
            },
            failures=(Overloaded, GenerationFailed),
        ),
        Route(
            "/stream",
            ("POST",),
            ChatFields,
            stream,
            has_query_and_history_alone,
            example=_QUESTION,
            answers={"text/event-stream": "".join(sse(event, event="delta").decode() for event in _EVENTS)},
            failures=(Overloaded,),
        ),
        Route("/clear", ("GET", "POST"), NoFields, clear, answers={"application/json": OK}),
        Route("/score", ("GET",), ScoreFields, score, example={"score": 5}, answers={"application/json": OK}),
    ),
    error_body=error_body,
    about=__doc__,
)

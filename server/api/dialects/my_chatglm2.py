"""my-chatglm2's HTTP protocol (v1.0 /stream, v1.1 /generate), as docile-chatty and its document use it.

Streams are cumulative: every event repeats the whole answer so far. An answer that fails on the way ends with an event
that has the text so far where it always is, and beside it a "message" and "success": false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flask import Response
from pydantic import Field

from server.api import webui
from server.api.dialect import Call, Dialect, Route, json_response
from server.api.fields import Fields, History, NoFields, Number, Text, WholeNumber, conversation
from server.api.streaming import ask, sse, stream_response, with_request_id
from server.core import GenerationRequest, Overflow, SamplingParams
from server.errors import GenerationFailed, Overloaded, ServerError

STARTED = {"message": "Server started", "success": True}
OK = {"message": "OK", "success": True}


class GenerateFields(Fields):
    """The original's fields, its hidden defaults as fields of their own, and a limit for the answer alone."""

    query: Text = Field("", description="the question; may be empty")
    answer_prefix: Text = Field("", description="the answer starts with it, and the model goes on from there")
    max_length: WholeNumber = Field(2048, ge=1, description="tokens of prompt and answer; capped by the server's limit")
    history: History = Field([], description="earlier rounds, [[question, answer], ...]; the oldest are dropped first")
    stream: bool = Field(False, description="server-sent events instead of plain text")
    top_p: Number = Field(0.7, ge=0, le=1, description="nucleus sampling; 0 leaves only the best token, 1 is off")
    temperature: Number = Field(1.0, ge=0, le=2, description="0 always takes the best token")
    top_k: WholeNumber = Field(50, ge=0, description="extension: sample from the k best tokens; 0 is off")
    repetition_penalty: Number = Field(1.0, gt=0, le=2, description="extension: above 1 avoids repetition")
    seed: WholeNumber | None = Field(None, ge=0, le=2**63 - 1, description="extension: same seed, same answer")
    max_tokens: WholeNumber | None = Field(None, ge=1, description="extension: tokens of the answer alone")


class StreamFields(GenerateFields):
    query: Text = Field(description="the question")


class InterruptFields(Fields):
    id: Text | None = Field(None, description="X-Request-Id of the answer to stop; else all from the caller's address")


class TokenizeFields(Fields):
    text: Text = Field(description="the text to cut")
    return_tokens: bool = Field(False, description="whether to list the pieces")


def root(call: Call, fields: NoFields) -> Response:
    """That the server is running: as a page for browsers, as JSON for others."""
    if webui.is_wanted():
        return webui.page(call)
    response = json_response(STARTED)
    response.headers["Vary"] = "Accept"
    return response


def generate(call: Call, fields: GenerateFields) -> Response:
    """v1.1: the whole answer as plain text, or as server-sent events while it is made.

    Each event is ``{"response": "<so far>"}``.
    """
    if fields.stream:
        return _stream(call, fields, lambda text, failure: {"response": text, **failure})
    answer = ask(call, _request(call, fields))
    text = answer.read_all()
    if answer.error:
        raise answer.error
    return with_request_id(Response(text, content_type="text/plain; charset=utf-8"), answer)


def stream(call: Call, fields: StreamFields) -> Response:
    """v1.0: the answer while it is made, as server-sent events with the whole history.

    Each event is ``["<so far>", [[q1, a1], ..., ["<query>", "<so far>"]]]``; a failure is a third element.
    """

    def event(text: str, failure: dict[str, Any]) -> list[Any]:
        return [text, [*fields.history, [fields.query, text]], *([failure] if failure else [])]

    return _stream(call, fields, event)


def _stream(call: Call, fields: GenerateFields, event: Callable[[str, dict[str, Any]], Any]) -> Response:
    answer = ask(call, _request(call, fields))

    def events() -> Iterator[bytes]:
        for _ in answer.deltas():
            failure = error_body(answer.error, call.language) if answer.error else {}
            # the engine's first output brings the prefix; the client hears it at once
            yield sse(event(answer.text or fields.answer_prefix, failure))

    return stream_response(events(), answer)


def _request(call: Call, fields: GenerateFields) -> GenerationRequest:
    return GenerationRequest(
        messages=conversation(fields.history, fields.query),
        answer_prefix=fields.answer_prefix,
        overflow=Overflow.DROP_OLDEST,
        params=SamplingParams(
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=fields.top_k,
            repetition_penalty=fields.repetition_penalty,
            seed=fields.seed,
            max_tokens=fields.max_tokens,
            max_length=min(fields.max_length, call.engine.max_length),
        ),
        client=call.client,
    )


def interrupt(call: Call, fields: InterruptFields) -> Response:
    """Stop one answer by its id, or what came from the caller's address; other people's answers go on."""
    if fields.id is None:
        call.engine.abort(client=call.client)
    else:
        call.engine.abort(request_id=fields.id)
    return json_response(OK)


def tokenize(call: Call, fields: TokenizeFields) -> Response:
    """How many tokens a text has, and which."""
    tokens = call.engine.tokenize(fields.text)
    return json_response({"tokens": tokens.pieces if fields.return_tokens else [], "len": len(tokens.ids)})


def error_body(error: ServerError, language: str) -> dict[str, Any]:
    return {"message": error.text(language), "success": False}


def has_text(fields: dict[str, Any]) -> bool:
    """has `text`"""
    return "text" in fields


def is_not_web_stream(fields: dict[str, Any]) -> bool:
    """does not have exactly `query` and `history`"""
    return set(fields) != {"query", "history"}


_EVENTS = ({"response": "你好"}, {"response": "你好！"})

DIALECT = Dialect(
    name="my-chatglm2",
    routes=(
        Route(
            "/",
            ("GET", "HEAD"),
            NoFields,
            root,
            answers={"application/json": STARTED, "text/html": "<!doctype html>…"},
        ),
        Route(
            "/stream",
            ("POST",),
            StreamFields,
            stream,
            is_not_web_stream,
            example={"query": "你好", "history": [["1+1=?", "2"]], "temperature": 0.95},
            answers={"text/event-stream": sse(["你好", [["1+1=?", "2"], ["你好", "你好"]]]).decode()},
            failures=(Overloaded,),
        ),
        Route(
            "/generate",
            ("GET", "POST"),
            GenerateFields,
            generate,
            example={"query": "你好"},
            answers={"text/plain": "你好！", "text/event-stream": "".join(sse(event).decode() for event in _EVENTS)},
            failures=(Overloaded, GenerationFailed),
        ),
        Route("/interrupt", ("POST",), InterruptFields, interrupt, answers={"application/json": OK}),
        Route(
            "/tokenize",
            ("POST",),
            TokenizeFields,
            tokenize,
            has_text,
            example={"text": "你好", "return_tokens": True},
            answers={"application/json": {"tokens": ["▁你", "好"], "len": 2}},
        ),
    ),
    error_body=error_body,
    about=__doc__,
)

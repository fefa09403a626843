"""One response, whole or as a stream, for chat and text completions alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flask import Response

from server.api.dialect import Call, json_response
from server.api.dialects.openai.answers import copies, news, read_all, start_all, still_running
from server.api.dialects.openai.fields import SamplingFields
from server.api.dialects.openai.shapes import error_body, now, usage_body
from server.api.streaming import REPEAT, Answer, sse, stream_response, with_request_id
from server.core import GenerationRequest, RequestOutput
from server.errors import BadRequest

PING = b": ping\n\n"  # a comment; anything else would be an event that clients cannot read
DONE = b"data: [DONE]\n\n"


class Choice(Protocol):
    """Makes JSON of one answer; a whole one comes as one output."""

    def opening(self) -> list[dict[str, Any]]:
        """What the stream begins with."""

    def chunks(self, output: RequestOutput) -> list[dict[str, Any]]:
        """What a piece of the answer adds to the stream."""

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The answer as it stands in a whole response."""


@dataclass(frozen=True)
class Kind:
    """The names of a kind of response, and what makes the JSON of its choices: ``choice(index, answer)``."""

    id_prefix: str
    whole: str
    chunk: str
    choice: Callable[[int, Answer], Choice]


def respond(call: Call, fields: SamplingFields, prompts: Sequence[GenerationRequest], kind: Kind) -> Response:
    """``fields.n`` answers to each request, in a row."""
    _check_room(call, len(prompts) * fields.n if fields.stream else fields.n)
    requests = [copy for prompt in prompts for copy in copies(prompt, fields.n)]
    if fields.stream:
        answers = start_all(call, requests)
        return stream_response(_events(call, fields, answers, kind), *answers)
    answered = read_all(call, requests)
    first = answered[0][0]
    choices = [kind.choice(index, answer).whole(output) for index, (answer, output) in enumerate(answered)]
    usage = usage_body([output for _, output in answered], fields.n)
    body = {**_head(call, kind, kind.whole, first), "choices": choices, "usage": usage}
    return with_request_id(json_response(body), first)


def _check_room(call: Call, answers: int) -> None:
    room = call.engine.capacity
    if answers > room:
        raise BadRequest(
            f"这个请求要同时生成 {answers} 个回答，本服务器最多 {room} 个。",
            f"This request is for {answers} answers at once; this server makes {room} at most.",
            param="n",
        )


def _head(call: Call, kind: Kind, name: str, first: Answer) -> dict[str, Any]:
    return {
        "id": f"{kind.id_prefix}-{first.stream.request_id}",
        "object": name,
        "created": now(),
        "model": call.engine.model_name,
    }


def _events(call: Call, fields: SamplingFields, answers: Sequence[Answer], kind: Kind) -> Iterator[bytes]:
    head = _head(call, kind, kind.chunk, answers[0])
    with_usage = fields.stream_options.include_usage

    def event(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        return sse({**head, "choices": choices, **({"usage": usage} if with_usage else {})})

    choices = [kind.choice(index, answer) for index, answer in enumerate(answers)]
    # something at once, for the status line goes out with it
    yield from [event([body]) for choice in choices for body in choice.opening()] or [PING]
    running = list(enumerate(answers))
    heard = time.perf_counter()
    while running and not call.gone():
        for index, output in news(running):
            if output.error:  # and no [DONE]: most clients would take the answer for a whole one
                yield sse(error_body(output.error, call.language))
                return
            for body in choices[index].chunks(output):
                yield event([body])
                heard = time.perf_counter()
        if time.perf_counter() - heard > REPEAT:
            yield PING
            heard = time.perf_counter()
        running = still_running(running)
    if running:  # the client has left
        return
    if with_usage:
        yield event([], usage_body([answer.final for answer in answers], fields.n))
    yield DONE

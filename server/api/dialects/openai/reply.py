"""One response, whole or as a stream, for chat and text completions alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flask import Response

from server.api.dialect import Call, json_response, to_json
from server.api.dialects.openai.answers import Answers, copies, joined
from server.api.dialects.openai.fields import SamplingFields
from server.api.dialects.openai.shapes import error_body, now, usage_body
from server.api.streaming import REPEAT, Answer, sse, stream_response, with_request_id
from server.core import GenerationRequest, RequestOutput
from server.errors import ServerError

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
    answers = Answers(call, [copy for prompt in prompts for copy in copies(prompt, fields.n)])
    reply = _Reply(call, fields, answers, kind)
    if fields.stream:
        response = stream_response(reply.events(), answers.first)
        response.call_on_close(answers.end)
        return response
    try:
        return with_request_id(json_response(reply.whole()), answers.first)
    finally:
        answers.end()


@dataclass
class _Unsent:
    """What an answer has said that has not been sent."""

    choice: Choice
    opened: bool = False
    said: list[RequestOutput] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.said and self.said[-1].finish_reason)


class _Reply:
    def __init__(self, call: Call, fields: SamplingFields, answers: Answers, kind: Kind):
        self._call = call
        self._answers = answers
        self._kind = kind
        self._n = fields.n
        self._created = now()
        self._with_usage = fields.stream_options.include_usage
        self._unsent: dict[int, _Unsent] = {}
        self._add_started()

    def whole(self) -> bytes:
        """The response's JSON; each choice is encoded as soon as its answer has ended, for they may be large."""
        choices: dict[int, bytes] = {}
        while not self._answers.over and not self._call.gone():
            self._listen()
            for index in [index for index, unsent in self._unsent.items() if unsent.ended]:
                unsent = self._unsent.pop(index)
                choices[index] = to_json(unsent.choice.whole(joined(unsent.said)))
        head = to_json(self._head(self._kind.whole)).removesuffix(b"}")
        usage = to_json(usage_body(self._answers.usages, self._n))
        listed = b", ".join(choice for _, choice in sorted(choices.items()))
        return b"".join((head, b', "choices": [', listed, b'], "usage": ', usage, b"}"))

    def events(self) -> Iterator[bytes]:
        """The response as a stream. While the client is behind with reading, what comes joins the next events."""
        # something at once, for the status line goes out with it
        yield from self._news() or [PING]
        heard = time.perf_counter()
        try:
            while not self._answers.over:
                if self._call.gone():
                    return
                self._listen()
                if self._call.behind():
                    continue
                events = self._news()
                if not events and time.perf_counter() - heard > REPEAT:
                    events = [PING]
                if events:
                    yield from events
                    heard = time.perf_counter()
        except ServerError as error:  # and no [DONE]: most clients would take the answer for a whole one
            yield from self._news()
            yield sse(error_body(error, self._call.language))
            return
        yield from self._news()
        if self._with_usage:
            yield self._event([], usage_body(self._answers.usages, self._n))
        yield DONE

    def _listen(self) -> None:
        for index, output in self._answers.read():
            self._unsent[index].said.append(output)
        self._add_started()

    def _add_started(self) -> None:
        for index, answer in self._answers.running.items():
            if index not in self._unsent:
                self._unsent[index] = _Unsent(self._kind.choice(index, answer))

    def _news(self) -> list[bytes]:
        """Events of all that is unsent."""
        bodies: list[dict[str, Any]] = []
        for index, unsent in list(self._unsent.items()):
            if not unsent.opened:
                unsent.opened = True
                bodies += unsent.choice.opening()
            if unsent.said:
                bodies += unsent.choice.chunks(joined(unsent.said))
            if unsent.ended:
                del self._unsent[index]
            unsent.said = []
        return [self._event([body]) for body in bodies]

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        head = self._head(self._kind.chunk)
        return sse({**head, "choices": choices, **({"usage": usage} if self._with_usage else {})})

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": f"{self._kind.id_prefix}-{self._answers.first.stream.request_id}",
            "object": name,
            "created": self._created,
            "model": self._call.engine.model_name,
        }

"""Reading an answer for an HTTP client: paced, kept alive, and stopped when the client leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from flask import Response

from server.api.dialect import Call, to_json
from server.core import FinishReason, GenerationRequest, RequestOutput, RequestStream
from server.errors import GenerationFailed, ServerError

PACE = 0.02  # seconds between events: clients that take a network chunk for an event lose those that run together
REPEAT = 1.5  # seconds without news until the client hears again; docile-chatty hangs up after 5
POLL = 0.25  # seconds between looks whether the client has left

log = logging.getLogger(__name__)


class Answer:
    """One answer while it is read: ``text`` is what there is so far, ``final`` the last output once it has come.

    ``on_end(answer)`` is called once, when the answer has been read to its end or given up.
    """

    def __init__(
        self,
        stream: RequestStream,
        gone: Callable[[], bool],
        on_end: Callable[[Answer], None],
        behind: Callable[[], bool] = lambda: False,
    ):
        self.stream = stream
        self.text = ""
        self.final: RequestOutput | None = None
        self._gone = gone
        self._behind = behind
        self._on_end: Callable[[Answer], None] | None = on_end

    @property
    def error(self) -> ServerError | None:
        return self.final.error if self.final else None

    def deltas(self, *, pace: float = PACE, repeat: float = REPEAT) -> Iterator[str]:
        """What is new, for one event each: "" at once, then whenever there is text and ``pace`` seconds have passed.

        After ``repeat`` seconds without news comes another "", and at the end one more piece, which may be "", with
        ``final`` set. It is ``pace`` seconds behind the one before, so that it travels alone. While the client is
        behind with reading, what comes joins the next piece. Ends early, without ``final``, if the client leaves.
        """
        yield ""
        # not monotonic(): on Windows that moves in steps of 16 ms
        sent, delta = time.perf_counter(), ""
        while not self.final and not self._gone():
            wait = sent + (pace if delta else repeat) - time.perf_counter()
            if wait <= 0 and self._behind():
                wait = PACE
            if wait > 0:
                delta += self._read(min(wait, POLL))
            else:
                yield delta
                sent, delta = time.perf_counter(), ""
        if self.final:
            time.sleep(max(0.0, sent + pace - time.perf_counter()))
            yield delta

    def read_all(self) -> str:
        """The whole text, or what there is when the client leaves or the generation fails."""
        while not self.final and not self._gone():
            self._read(POLL)
        self.end()
        return self.text

    def end(self) -> None:
        """Stop generating if that still goes on, and read to the end, for the counts: a closed stream ends at once."""
        self.stream.close()
        while not self.final:
            self._read(POLL)
        on_end, self._on_end = self._on_end, None
        if on_end:
            on_end(self)

    def read(self, timeout: float) -> RequestOutput | None:
        """The next output, or None if nothing is new within ``timeout`` seconds; a reader that fails is its end."""
        try:
            output = self.stream.get(timeout)
        except Exception:
            log.exception("reading the answer %s failed", self.stream.request_id)
            error = GenerationFailed("读取回答时出错，详见服务器日志。", "The answer failed; see the server's log.")
            output = RequestOutput(finish_reason=FinishReason.ERROR, error=error)
        if output is not None:
            self.text += output.text
            if output.finish_reason:
                self.final = output
        return output

    def _read(self, timeout: float) -> str:
        output = self.read(timeout)
        return output.text if output else ""


def ask(call: Call, request: GenerationRequest) -> Answer:
    """Submit a request; the exchange goes into the chat log once it is over."""
    questions = [message.content for message in request.messages if message.role == "user"]
    asked = questions[-1] if questions else request.prompt or ""
    return Answer(call.engine.submit(request), call.gone, partial(_record, call, asked), call.behind)


def _record(call: Call, query: str, answer: Answer) -> None:
    if call.settings.chat_log:
        call.settings.chat_log.record(
            client=call.client,
            request_id=answer.stream.request_id,
            query=query,
            answer=answer.text,
            final=answer.final,
        )


def sse(data: Any, *, event: str = "") -> bytes:
    """One server-sent event with a line of JSON, unnamed unless ``event`` says its name."""
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + to_json(data) + b"\n\n"


def stream_response(events: Iterable[bytes], answer: Answer) -> Response:
    """An event stream, each event one write; the answer's stream is closed however the response ends."""
    response = Response(events, content_type="text/event-stream; charset=utf-8")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would collect events
    # not in a finally of the generator: one that was never started does not run it
    response.call_on_close(answer.end)
    return with_request_id(response, answer)


def with_request_id(response: Response, answer: Answer) -> Response:
    response.headers["X-Request-Id"] = answer.stream.request_id
    return response

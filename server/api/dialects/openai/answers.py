"""The answers to one request, which may ask for many: some run at the same time, and one thread reads them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from server.api.dialect import Call
from server.api.streaming import POLL, Answer, ask
from server.core import FinishReason, GenerationRequest, RequestOutput, Usage
from server.errors import GenerationFailed, Overloaded, ShuttingDown

TURN = 0.02  # seconds for one look at all answers of a request
SHARE = 2  # a request for many answers leaves slots to others: it takes one part of so many at once


def copies(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The request ``n`` times, a given seed counted up and a negative one mapped to those that the engine takes."""
    params = request.params
    if params.seed is None:
        return [request] * n
    seeds = [(params.seed + index) % 2**63 for index in range(n)]
    return [replace(request, params=replace(params, seed=seed)) for seed in seeds]


class Answers:
    """Answers to any number of requests; a part of the engine's slots is used at once, and the rest wait here.

    ``first`` is the first of them, ``running`` those that are being made, by their requests' indices, and ``usages``
    has that of each one that has ended. Raises what ``Engine.submit`` does; Overloaded only for the first, for the
    others wait until there is room, or when the server is stopping.
    """

    def __init__(self, call: Call, requests: Sequence[GenerationRequest]):
        self.first = ask(call, requests[0])
        self.running: dict[int, Answer] = {0: self.first}
        self.usages = [Usage()] * len(requests)
        self._call = call
        self._most = max(1, call.engine.slots // SHARE)
        self._waiting = deque(enumerate(requests[1:], 1))
        try:
            self._start_more()
        except BaseException:
            self.end()
            raise

    @property
    def over(self) -> bool:
        return not self.running and not self._waiting

    def read(self) -> Iterator[tuple[int, RequestOutput]]:
        """One look at every running answer: what is new, with its index. Waits a moment where nothing is.

        Those that have ended make room for others. Raises an answer's error, and GenerationFailed for an interruption
        with requests left.
        """
        if not self.running:
            time.sleep(POLL)  # others have taken all the room
        timeout = POLL if len(self.running) == 1 else TURN / max(1, len(self.running))
        for index, answer in list(self.running.items()):
            if output := answer.read(timeout):
                if output.error:
                    raise output.error
                if output.finish_reason is FinishReason.ABORT and self._waiting:
                    raise _interrupted()
                if output.finish_reason:
                    self._forget(index, output)
                yield index, output
        self._start_more()

    def end(self) -> None:
        """Stop all that still goes on."""
        self._waiting.clear()
        while self.running:
            _, answer = self.running.popitem()
            answer.end()

    def _forget(self, index: int, last: RequestOutput) -> None:
        # what an answer holds of the engine may be large
        self.running.pop(index).end()
        self.usages[index] = last.usage or Usage()

    def _start_more(self) -> None:
        while self._waiting and len(self.running) < self._most and not self._call.gone():
            index, request = self._waiting[0]
            try:
                self.running[index] = ask(self._call, request)
            except ShuttingDown:
                raise
            except Overloaded:
                return
            self._waiting.popleft()


def _interrupted() -> GenerationFailed:
    return GenerationFailed(
        "请求被打断，还有回答没有生成。", "The request was interrupted before all its answers were made."
    )


def joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Consecutive outputs as one."""
    last = outputs[-1] if outputs else RequestOutput()
    return replace(
        last,
        text="".join(output.text for output in outputs),
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=tuple(chain.from_iterable(output.logprobs for output in outputs)),
        tool_calls=tuple(chain.from_iterable(output.tool_calls for output in outputs)),
        prompt_logprobs=tuple(chain.from_iterable(output.prompt_logprobs for output in outputs)),
    )

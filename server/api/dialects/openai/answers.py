"""The answers to one request, which may ask for many: started, and read at the same time by one thread."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from server.api.dialect import Call
from server.api.streaming import POLL, Answer, ask
from server.core import FinishReason, GenerationRequest, RequestOutput
from server.errors import GenerationFailed, Overloaded

TURN = 0.02  # seconds for one look at all answers of a request
SHARE = 2  # a request for many answers leaves room for others: it takes one part of so many at once

Running = tuple[int, Answer]  # with its index among the request's answers


def copies(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The request ``n`` times, a given seed counted up and a negative one mapped to those that the engine takes."""
    params = request.params
    if params.seed is None:
        return [request] * n
    seeds = [(params.seed + index) % 2**63 for index in range(n)]
    return [replace(request, params=replace(params, seed=seed)) for seed in seeds]


def start_all(call: Call, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """All answers, or the exception of the first that cannot be started; the others are ended then."""
    answers: list[Answer] = []
    try:
        for request in requests:
            answers.append(ask(call, request))
    except BaseException:
        end_all(answers)
        raise
    return answers


def end_all(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.end()


def news(running: Sequence[Running]) -> Iterator[tuple[int, RequestOutput]]:
    """One look at every answer: what is new, with the answer's index. Waits a moment where nothing is."""
    for index, answer in running:
        output = answer.read(POLL if len(running) == 1 else TURN / len(running))
        if output:
            yield index, output


def still_running(answers: Iterable[Running]) -> list[Running]:
    return [(index, answer) for index, answer in answers if not answer.final]


def read_all(call: Call, requests: Sequence[GenerationRequest]) -> list[tuple[Answer, RequestOutput]]:
    """Answers and all that they said, in the order of their requests; not all if the client leaves.

    There may be any number: a part of the engine's capacity is used at once. Only the first is refused when the engine
    is full, the others wait. Raises the first error, whichever request it is of, and GenerationFailed for an
    interruption with requests left.
    """
    answers: list[Answer] = []
    running: list[Running] = []
    said: list[list[RequestOutput]] = [[] for _ in requests]
    try:
        while True:
            running = still_running(running)
            running += _start_more(call, requests, answers, len(running))
            if call.gone() or (not running and len(answers) == len(requests)):
                break
            if not running:
                time.sleep(POLL)  # others have taken all the room
            for index, output in news(running):
                if output.error:
                    raise output.error
                if output.finish_reason is FinishReason.ABORT and len(answers) < len(requests):
                    raise _interrupted()
                said[index].append(output)
    finally:
        end_all(answers)
    return [(answer, joined(outputs)) for answer, outputs in zip(answers, said, strict=False)]


def _start_more(
    call: Call, requests: Sequence[GenerationRequest], answers: list[Answer], running: int
) -> list[Running]:
    """Start what there is room for beside the ``running`` ones; it is added to ``answers`` too."""
    begun = len(answers)
    room = max(1, call.engine.capacity // SHARE) - running
    try:
        for request in requests[begun : begun + room]:
            answers.append(ask(call, request))
    except Overloaded:
        if not answers:
            raise
    return list(enumerate(answers[begun:], begun))


def _interrupted() -> GenerationFailed:
    return GenerationFailed(
        "请求被打断，还有 prompt 没有回答。", "The request was interrupted before all its prompts were answered."
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

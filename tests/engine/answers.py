"""Asking an engine for answers, and what it gave."""

from dataclasses import dataclass

from server.core import GenerationRequest, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@dataclass
class Answer:
    """What a stream gave, and how many of its ids were drafted."""

    prompt: list[int]
    ids: list[int]
    text: str
    logprobs: list
    last: object
    drafted: int
    kept: int


def read(stream):
    outputs = list(stream)
    ids = [i for output in outputs for i in output.token_ids]
    logprobs = [entry for output in outputs for entry in output.logprobs]
    text, drafter = "".join(output.text for output in outputs), stream._sequence.drafter
    counts = (drafter.drafted, drafter.kept) if drafter else (0, 0)
    return Answer(list(stream.prompt_ids), ids, text, logprobs, outputs[-1], *counts)


def ask(engine, *requests):
    """The answers to requests that run at the same time."""
    return [read(stream) for stream in [engine.submit(request) for request in requests]]


def ids_request(ids, params=GREEDY):
    return GenerationRequest(prompt_ids=tuple(ids), params=params)

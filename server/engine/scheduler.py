"""Decides what the next step computes; computes nothing itself."""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from server.core import FinishReason
from server.engine.sequence import Sequence
from server.engine.slots import SlotTable
from server.errors import ServerError

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """The next ``length`` pending tokens of a sequence; with the last of them a new token is drawn."""

    sequence: Sequence
    length: int

    @property
    def draws(self) -> bool:
        return self.length == self.sequence.num_pending

    @property
    def scored(self) -> int:
        """How many of the first tokens of this work predict another token of a prompt whose scores are wanted."""
        if self.sequence.params.prompt_logprobs is None:
            return 0
        return max(0, min(self.length, self.sequence.num_prompt - 1 - self.sequence.num_computed))


class Scheduler:
    """Continuous batching: every running answer gets one token per step, and prompts are read beside them in chunks.

    ``chunk`` limits the prompt tokens of one step, so that running streams never wait for more than one chunk.
    A family without a causal prompt is read whole (``causal_prompt`` False): a chunk could not see what follows it.
    """

    def __init__(self, slots: SlotTable, *, chunk: int, causal_prompt: bool = True):
        self._slots = slots
        self._chunk = chunk
        self._causal_prompt = causal_prompt
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    @property
    def unfinished(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def schedule(self) -> list[Work]:
        """Admit what fits and return the work of the next step; empty if there is nothing to do."""
        while self._waiting and self._slots.has_free():
            sequence = self._waiting.popleft()
            self._slots.acquire(sequence)
            self._running.append(sequence)
            if not self._causal_prompt and sequence.num_pending > self._chunk:
                log.info("%s: %d prompt tokens are read in one step", sequence.request_id, sequence.num_pending)
        answering = [Work(s, 1) for s in self._running if s.num_pending == 1]
        return answering + self._prompt_work()

    def _prompt_work(self) -> list[Work]:
        work, budget = [], self._chunk
        for sequence in self._running:
            if sequence.num_pending == 1 or budget == 0:
                continue
            length = min(sequence.num_pending, budget) if self._causal_prompt else sequence.num_pending
            work.append(Work(sequence, length))
            budget = max(0, budget - length)
        return work

    def postprocess(self, work: list[Work], results: list[int | ServerError | None]) -> None:
        """Take the step's results, one per piece of work: a drawn id, a failure, or None (the prompt goes on)."""
        for (sequence, length), result in zip(work, results, strict=True):
            if isinstance(result, ServerError):
                sequence.finish(FinishReason.ERROR, result)
                continue
            sequence.num_computed += length
            if result is not None and sequence.finished is None:
                sequence.append(result)

    def collect_finished(self) -> list[Sequence]:
        """Remove what has ended, by itself or by an abort, and free its slots."""
        finished = [s for s in self.unfinished if s.finished]
        for sequence in finished:
            if sequence.slot is None:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
                self._slots.release(sequence)
        return finished

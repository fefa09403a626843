"""Decides what the next step computes; computes nothing itself."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence as Ids
from typing import NamedTuple

from server.core import FinishReason
from server.engine.sequence import Drawn, Sequence
from server.engine.slots import SlotTable
from server.engine.speculation import Speculation

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """The next ``length`` pending tokens of a sequence; with the last of them a new token is drawn.

    Behind them ``draft`` is computed, and as long as what is drawn is what was drafted, the next token is drawn too.
    """

    sequence: Sequence
    length: int
    draft: Ids[int] = ()

    @property
    def rows(self) -> int:
        return self.length + len(self.draft)

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
    """Continuous batching: every running answer gets tokens in every step, and prompts are read beside them in chunks.

    An answer gets one token, and more where ``speculation`` guessed them. ``chunk`` limits the prompt tokens of a step,
    so that running streams never wait for more than one chunk.
    A family without a causal prompt is read whole (``causal_prompt`` False): a chunk could not see what follows it.
    """

    def __init__(
        self, slots: SlotTable, *, chunk: int, causal_prompt: bool = True, speculation: Speculation | None = None
    ):
        self._slots = slots
        self._chunk = chunk
        self._causal_prompt = causal_prompt
        self._speculation = speculation
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    @property
    def unfinished(self) -> list[Sequence]:
        return [*self._running, *self._waiting]

    def schedule(self) -> list[Work]:
        """Admit what fits and return the work of the next step; empty if there is nothing to do."""
        while self._waiting and self._slots.has_room():
            sequence = self._waiting.popleft()
            self._slots.acquire(sequence)
            self._running.append(sequence)
            if not self._causal_prompt and sequence.num_pending > self._chunk:
                log.info("%s: %d prompt tokens are read in one step: this model reads every prompt whole and reuses "
                         "none of an earlier one", sequence.request_id, sequence.num_pending)
        return self._answer_work() + self._prompt_work()

    def _answer_work(self) -> list[Work]:
        answering = [s for s in self._running if s.num_pending == 1]
        if self._speculation is None:
            return [Work(sequence, 1) for sequence in answering]
        drafts = self._speculation.drafts(answering)
        return [Work(sequence, 1, draft) for sequence, draft in zip(answering, drafts, strict=True)]

    def _prompt_work(self) -> list[Work]:
        work, budget = [], self._chunk
        for sequence in self._running:
            if sequence.num_pending == 1 or budget == 0:
                continue
            length = min(sequence.num_pending, budget) if self._causal_prompt else sequence.num_pending
            work.append(Work(sequence, length))
            budget = max(0, budget - length)
        return work

    def postprocess(self, work: list[Work], results: list[Drawn]) -> None:
        """Take the step's results, one per piece of work."""
        for piece, drawn in zip(work, results, strict=True):
            sequence, before = piece.sequence, len(piece.sequence.token_ids)
            for token_id in drawn.token_ids:
                if sequence.finished is None:
                    sequence.append(token_id)
            if drawn.error:
                sequence.finish(FinishReason.ERROR, drawn.error)
                continue
            # All but the last of what was drawn had been drafted and are computed. What was drafted wrongly is in the
            # slot too; the next step writes over it.
            kept = min(len(sequence.token_ids) - before, max(0, len(drawn.token_ids) - 1))
            sequence.num_computed += piece.length + kept
            if piece.draft:
                sequence.drafter.note(len(piece.draft), kept)

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

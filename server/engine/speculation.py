"""Speculative decoding without a second model: ids that may come next, from the text itself, and how many of them pay.

A step reads every weight once, for however many rows: drafted ids behind the newest one are checked in the step that
reads it (Leviathan et al., https://arxiv.org/abs/2211.17192). The drafts are made by prompt lookup: Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple, Protocol

from server.engine.sequence import Sequence

# Lengths of the n-grams that are looked up, and how likely the id behind a match is right before anything is known of
# a text: between prose (0.75, 0.60, 0.50, 0.26 as measured) and edited code (0.99, 0.75, 0.46, 0.27). The longest is
# the mark of a copied passage; edits take about a fifth less time with it than with 3, 2, 1. Single ids pay where rows
# are cheap.
FIRST_CHANCE = {12: 0.85, 4: 0.6, 2: 0.45, 1: 0.25}
# Rows of a step, answers and drafts together: what the kernels for few rows are made for.
MOST_ROWS = 16
# What a row more costs, as a share of a step of one row, by back end (benchmarks/speculation.py measures it). torch: as
# the demo model; 16 bits at full size cost less, 8 clients get 8 times the tokens of one. cpu: of int4 at full size 8
# rows take 1.2 times as long as one behind 32 tokens and 1.4 times behind 1,024, 16 rows 2.2 and 2.7 times.
ROW_COST = {"torch": 0.05, "cpu": 0.05}
# What stays of the evidence with each id that was checked (so that some 20 of them count), and with each draft that
# was not worth it: what has failed is tried again after some 100 of those.
_KEEP_CHECKED, _KEEP_IDLE = 0.95, 0.98


def row_cost(back_end: str) -> float:
    """By ``Ops.name``, whose first word is the kind of back end; an unknown one is taken for a slow one."""
    return ROW_COST.get(back_end.partition("-")[0], max(ROW_COST.values()))


class Draft(NamedTuple):
    """Ids that may come next; ``evidence`` is what speaks for them (for prompt lookup the n of the n-gram)."""

    token_ids: list[int]
    evidence: int


class Proposer(Protocol):
    def propose(self, most: int) -> Draft:
        """At most ``most`` ids, maybe none, to follow the text as it is now."""


class PromptLookup:
    """Proposes what came behind the newest n ids of a text where they stood before, the last time that they did.

    ``token_ids`` is the text itself, which grows; each place of it is taken into the index once.
    """

    def __init__(self, token_ids: list[int]):
        self._ids = token_ids
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in FIRST_CHANCE}  # where an n-gram ends
        self._indexed = 1
        self._extend()

    def propose(self, most: int) -> Draft:
        self._extend()
        for n, ends in self._ends.items():
            if (end := ends.get(tuple(self._ids[-n:]))) is not None:
                return Draft(self._behind(end, most), n)
        return Draft([], 0)

    def _extend(self) -> None:
        """Take in the n-grams that an id has come behind since."""
        for end in range(self._indexed, len(self._ids)):
            for n, ends in self._ends.items():
                if n <= end:
                    ends[tuple(self._ids[end - n : end])] = end
        self._indexed = max(self._indexed, len(self._ids))

    def _behind(self, end: int, most: int) -> list[int]:
        """The ids from ``end`` on; where the text is over they go on as they began, as repetitions do."""
        found = self._ids[end : end + most]
        return [found[i % len(found)] for i in range(most)]


class Acceptance:
    """A running estimate of the chance that a drafted id is kept if those before it were."""

    def __init__(self, first: float):
        self._first = first  # counts as one id that was checked
        self._kept = self._checked = 0.0

    @property
    def chance(self) -> float:
        return (self._kept + self._first) / (self._checked + 1)

    def note(self, drafted: int, kept: int) -> None:
        """Of the ids behind the first one that was not kept nothing is known."""
        checked = min(drafted, kept + 1)
        self._fade(_KEEP_CHECKED**checked)
        self._kept += kept
        self._checked += checked

    def rest(self) -> None:
        """A draft was not worth checking."""
        self._fade(_KEEP_IDLE)

    def _fade(self, share: float) -> None:
        self._kept *= share
        self._checked *= share


class Drafter:
    """The drafts of one sequence and how they fare; ``drafted`` and ``kept`` count ids for the log."""

    def __init__(self, proposer: Proposer, stop_ids: frozenset[int]):
        self._proposer = proposer
        self._stop_ids = stop_ids
        self._acceptance: dict[int, Acceptance] = {}
        self._latest = Acceptance(0.0)
        self.drafted = self.kept = 0

    def propose(self, most: int) -> tuple[list[int], float]:
        """At most ``most`` ids that do not end the answer, and the chance of each if those before it are kept."""
        if most <= 0:
            return [], 0.0
        ids, evidence = self._proposer.propose(most)
        # behind an id that ends the answer nothing is drawn, and it can be drawn without being proposed
        ids = ids[: next((at for at, token in enumerate(ids) if token in self._stop_ids), len(ids))]
        self._latest = self._acceptance.setdefault(evidence, Acceptance(FIRST_CHANCE.get(evidence, 0.5)))
        return ids, self._latest.chance

    def note(self, drafted: int, kept: int) -> None:
        """What became of the latest proposal, of which ``drafted`` ids were checked."""
        self._latest.note(drafted, kept)
        self.drafted += drafted
        self.kept += kept

    def skip(self) -> None:
        """The latest proposal was not worth checking."""
        self._latest.rest()


class Speculation:
    """How many ids every answer has checked in a step; ``most`` per answer, None for as many as pay."""

    def __init__(self, most: int | None, row_cost: float):
        self._most = MOST_ROWS - 1 if most is None else most
        self._row_cost = row_cost

    def drafts(self, sequences: list[Sequence]) -> list[list[int]]:
        """For each of the sequences of a step, which draw one id each without this."""
        proposed = [s.drafter.propose(min(self._most, s.room - 1)) for s in sequences]
        counts = allot([(len(ids), chance) for ids, chance in proposed], self._row_cost)
        for sequence, (ids, _), count in zip(sequences, proposed, counts, strict=True):
            if ids and not count:
                sequence.drafter.skip()
        return [ids[:count] for (ids, _), count in zip(proposed, counts, strict=True)]


def allot(offers: list[tuple[int, float]], row_cost: float) -> list[int]:
    """How many ids of each draft to check for the most tokens per time.

    ``offers`` has the length of each answer's draft and the chance p of its ids: the j-th is kept with p^j. A step of R
    rows takes 1 + row_cost * (R - 1). The likeliest ids first, as long as one adds a larger share of tokens than of
    time: so the more answers share a step, the better must a draft be.
    """
    counts = [0] * len(offers)
    tokens, time = float(len(offers)), 1 + row_cost * (len(offers) - 1)
    best = [(-chance, at) for at, (length, chance) in enumerate(offers) if length]
    heapq.heapify(best)
    while best and len(offers) + sum(counts) < MOST_ROWS:
        gain, at = heapq.heappop(best)
        if -gain * time <= row_cost * tokens:
            break
        tokens, time = tokens - gain, time + row_cost
        counts[at] += 1
        length, chance = offers[at]
        if counts[at] < length:
            heapq.heappush(best, (gain * chance, at))
    return counts

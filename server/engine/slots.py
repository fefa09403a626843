"""Which slot of the KV cache holds whose tokens, and which one a new prompt should take."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from server.engine.kv_cache import KVCache
from server.engine.sequence import Sequence


@dataclass
class Slot:
    """``sequence`` is None when free; ``tokens`` is what a finished sequence left in the cache."""

    index: int
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    last_used: int = 0

    def held(self) -> list[int]:
        """Ids whose keys and values are in this slot now."""
        return self.sequence.token_ids[: self.sequence.num_computed] if self.sequence else self.tokens


def common_prefix(left: Ids[int], right: Ids[int]) -> int:
    """How many ids two lists share from the start."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


class SlotTable:
    """Gives slots to sequences so that a follow-up round finds its history in the cache.

    At most ``at_once`` sequences run; the cache's other slots hold what finished ones left, the latest of them.
    """

    def __init__(self, cache: KVCache, at_once: int, *, reuse_prefix: bool):
        self._cache = cache
        self._at_once = at_once
        self._reuse_prefix = reuse_prefix
        self._slots = [Slot(i) for i in range(cache.slots)]
        self._clock = 0

    def has_room(self) -> bool:
        return sum(slot.sequence is not None for slot in self._slots) < self._at_once

    def acquire(self, sequence: Sequence) -> None:
        """Give ``sequence`` a free slot and whatever of its prompt is cached anywhere; there must be room.

        The slot that shares the longest prefix is continued in place if that keeps at least half of what it holds;
        otherwise its shared part is copied into the free slot that was unused for longest, so that an unrelated
        question (all prompts begin alike) does not destroy somebody's long conversation.
        """
        source, shared = self._longest_match(sequence)
        if source and source.sequence is None and 2 * shared >= len(source.tokens):
            target = source
        else:
            target = self._least_recent(source)
            if source and target is not source:
                self._cache.copy(source.index, target.index, shared)
        target.sequence, target.tokens = sequence, []
        sequence.slot = target.index
        sequence.num_computed = sequence.num_cached = shared

    def release(self, sequence: Sequence) -> None:
        """Free a finished sequence's slot; what it computed stays for reuse."""
        slot = self._slots[sequence.slot]
        self._clock += 1
        slot.tokens, slot.sequence, slot.last_used = slot.held(), None, self._clock
        sequence.slot = None

    def forget(self) -> None:
        """Reuse nothing of what finished sequences left."""
        for slot in self._slots:
            slot.tokens = []

    def _least_recent(self, source: Slot | None) -> Slot:
        """The free slot that was unused for longest; ``source`` only where no other is free."""
        free = [slot for slot in self._slots if slot.sequence is None]
        return min(free, key=lambda slot: (slot is source, slot.last_used))

    def _longest_match(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds most of the prompt's beginning, and how many ids of it; None where nothing is reused."""
        if not self._reuse_prefix or sequence.params.prompt_logprobs is not None:  # those need every token's logits
            return None, 0
        prompt = sequence.token_ids
        # the last token is always read again: its logits are needed
        lengths = [min(common_prefix(slot.held(), prompt), len(prompt) - 1) for slot in self._slots]
        # of equal ones the latest: where all prompts begin alike, the oldest must not be spared for that
        shared, _, _, index = max(
            (length, slot.sequence is None, slot.last_used, slot.index)
            for length, slot in zip(lengths, self._slots, strict=True)
        )
        return self._slots[index], shared

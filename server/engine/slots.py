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
    """Gives slots to sequences so that a follow-up round finds its history in the cache."""

    def __init__(self, cache: KVCache, *, reuse_prefix: bool):
        self._cache = cache
        self._reuse_prefix = reuse_prefix
        self._slots = [Slot(i) for i in range(cache.slots)]
        self._clock = 0

    def has_free(self) -> bool:
        return any(slot.sequence is None for slot in self._slots)

    def acquire(self, sequence: Sequence) -> None:
        """Give ``sequence`` a free slot and whatever of its prompt is cached anywhere.

        The slot that shares the longest prefix is continued in place if that keeps at least half of what it holds;
        otherwise its shared part is copied into the free slot that was unused for longest, so that an unrelated
        question (all prompts begin alike) does not destroy somebody's long conversation.
        """
        source, shared = self._longest_match(sequence)
        if source.sequence is None and 2 * shared >= len(source.tokens):
            target = source
        else:
            target = min((slot for slot in self._slots if slot.sequence is None), key=lambda slot: slot.last_used)
            if target is not source and shared:
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

    def _longest_match(self, sequence: Sequence) -> tuple[Slot, int]:
        if not self._reuse_prefix or sequence.params.prompt_logprobs is not None:  # those need every token's logits
            return self._slots[0], 0
        prompt = sequence.token_ids
        # the last token is always read again: its logits are needed
        lengths = [min(common_prefix(slot.held(), prompt), len(prompt) - 1) for slot in self._slots]
        best = max(range(len(lengths)), key=lambda i: (lengths[i], self._slots[i].sequence is None))
        return self._slots[best], lengths[best]

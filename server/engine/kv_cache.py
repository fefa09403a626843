"""Keys and values of all sequences: one contiguous stretch of memory per slot."""

from __future__ import annotations

import torch

from server.models.base import KVShape, Segment


class KVCache:
    """``slots`` stretches of ``capacity`` tokens each, for all layers.

    A contiguous slot per sequence needs no paged attention kernel, which neither Windows nor a CPU has. ``keys`` and
    ``values`` as in ``models.base.KVCache``. ``prefix`` is a P-tuning v2 prefix (keys, values), each
    [layers, n, groups, head_dim]: it stands in front of every slot and is not counted in any token number.
    """

    def __init__(
        self,
        shape: KVShape,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.slots = slots
        self.capacity = capacity
        self.offset = prefix[0].shape[1] if prefix else 0
        size = (shape.layers, slots, shape.groups, self.offset + capacity, shape.head_dim)
        # left unset: on the CPU the system gives the pages only when a long conversation reaches them
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)
        if prefix:
            self.keys[..., : self.offset, :] = prefix[0].transpose(1, 2).unsqueeze(1)
            self.values[..., : self.offset, :] = prefix[1].transpose(1, 2).unsqueeze(1)

    @staticmethod
    def bytes_needed(shape: KVShape, slots: int, capacity: int, dtype: torch.dtype) -> int:
        """Size in bytes, without a prefix."""
        return 2 * shape.layers * slots * shape.groups * capacity * shape.head_dim * dtype.itemsize

    def update(
        self, layer: int, segment: Segment, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``models.base.KVCache.update``; the results are views, nothing is copied."""
        begin = self.offset + segment.start
        end = begin + segment.length
        keys, values = self.keys[layer, segment.slot], self.values[layer, segment.slot]
        keys[:, begin:end] = key.transpose(0, 1)
        values[:, begin:end] = value.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of one slot to another."""
        part = slice(self.offset, self.offset + tokens)
        self.keys[:, target, :, part] = self.keys[:, source, :, part]
        self.values[:, target, :, part] = self.values[:, source, :, part]

"""The operations that the networks are made of: what each one means, so that a back end can replace it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class QuantWeight:
    """A weight matrix [out_features, in_features] as small integers: W[r, c] = scales[r, c // group_size] * v[r, c].

    ``codes`` int8 holds what stands for the v row by row, ``groups * group_size`` of them; those beyond ``in_features``
    are not used.

    * 8 bits: the v themselves, [out_features, groups * group_size]; ``table`` is None.
    * 4 bits: places in ``table`` int8 [16]; [out_features, groups * group_size / 2], byte k holds column 2k in its high
      and column 2k + 1 in its low nibble (the packing of the official ChatGLM int4 checkpoints).

    ``scales`` [out_features, groups] is float32, or float16 for 8 bits. An official checkpoint has one group per row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_size: int
    in_features: int
    table: torch.Tensor | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]


@dataclass(frozen=True)
class DecoderLayer:
    """A layer of ChatGLM2: x += dense(attention(query_key_value(norm(x)))), then x += to_h(swiglu(h_to_4h(norm(x)))).

    The matrices are as ``Ops.prepare`` made them, or float tensors [out_features, in_features] where nothing is
    quantized. ``bias`` is that of query_key_value: all queries, then keys, then values of ``head_dim`` each.
    """

    input_norm: torch.Tensor  # [hidden]
    query_key_value: Any
    bias: torch.Tensor | None
    dense: Any
    post_attention_norm: torch.Tensor
    h_to_4h: Any
    to_h: Any
    heads: int
    groups: int
    head_dim: int
    eps: float


class Decoder(Protocol):
    """All layers of a network in one call."""

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        segments: Sequence[tuple[int, int, int]],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor | None:
        """x [T, hidden] behind the last layer, and its keys and values stored; None for a dtype or layout that this
        cannot take. Raises ValueError for places that the cache does not have.

        ``cos_sin`` as for ``Ops.rotary_interleaved``. Each of ``segments`` is (slot, start, length): as many rows of x
        stand behind ``start`` others in that slot. ``keys`` and ``values``: [layers, slots, groups, places, head_dim].
        """


class Ops(Protocol):
    """A back end: one implementation for one kind of device.

    All floating point tensors of a call have one dtype (float32, bfloat16 or float16) and one device, except where it
    says float32, and that keys and values may be float16 beside float32 queries. Inputs have a contiguous last
    dimension, and none requires a gradient. Sums are kept in float32 or better. NaN in what a result depends on gives
    NaN. A back end may return a view of memory that it reuses at its next call of the same operation.
    """

    name: str
    storage: torch.dtype | None  # of embeddings, keys and values beside float32 activations; None: as those are
    dense_bits: int  # of linear layers that nobody wanted quantized: 16, or what this back end computes with at best

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [T, n] / sqrt(mean(x^2) + eps) * weight [n], all in float32, rounded to x's dtype at the end.

        Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
        """

    def rotary_interleaved(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        """Rotate pairs (x[2t], x[2t+1]) at the front of each head, in place; returns x.

        x [T, H, d], each row's H * d values contiguous (rows need not be: x may be a part of a fused projection);
        cos_sin float32 [T, r/2, 2], r <= d; values r .. d-1 of a head stay. The arithmetic is float32.
        Su et al., https://arxiv.org/abs/2104.09864, on a part of the head as in GPT-J.
        """

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """silu(a) * c for x = [a | c] [T, 2n]; [T, n]. Shazeer, https://arxiv.org/abs/2002.05202."""

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, context: int = 0
    ) -> torch.Tensor:
        """Attention of the newest n tokens of one sequence to all L of it; [n, H * d].

        query [n, H, d]; key and value [G, L, d], L >= n, each [L, d] contiguous (groups may lie apart: they are slots
        of a cache). Query head j belongs to group j // (H / G). Row i sees keys 0 .. L - n + i, and the first
        ``context`` keys whatever its place (the prompt of a prefix language model). Scores are divided by sqrt(d).
        """

    def quantize(self, weight: torch.Tensor, bits: int) -> QuantWeight:
        """A floating point matrix [out, in] in 8 or 4 bits; see ``kernels.quantize.quantize``."""

    def prepare(self, weight: QuantWeight) -> Any:
        """The weight in whatever layout this back end wants it in ``quant_linear``; called once, at loading."""

    def quant_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in_features] times the transposed prepared weight, plus bias [out_features]; [T, out_features]."""

    def decoder(self, layers: Sequence[DecoderLayer]) -> Decoder | None:
        """All layers as one call, where the back end has one: else they are computed operation by operation."""

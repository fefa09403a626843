"""Layers whose weight is quantized: they take the place of torch's, so that networks know nothing of bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from server.kernels.ops import Ops, QuantWeight
from server.kernels.torch_ops import dequantize


class QuantLinear(torch.nn.Module):
    """y = x W^T + b with W as small integers; ``bias`` keeps nn.Linear's name, so a checkpoint finds it."""

    def __init__(self, weight: Any, bias: torch.nn.Parameter | None, ops: Ops):
        """``weight``: what ``ops.prepare`` made."""
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bits = weight.bits
        self.bias = bias
        self.weight = weight
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.quant_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class QuantEmbedding(torch.nn.Module):
    """Rows of a matrix [ids, values] of small integers, unpacked when they are looked up.

    That of the official chatglm-6b-int4-qe shares its weight with the output layer.
    """

    def __init__(self, weight: QuantWeight, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings = weight.out_features
        self.embedding_dim = weight.in_features
        self.bits = weight.bits
        self._weight = weight
        self._dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] to [T, embedding_dim]."""
        rows = replace(self._weight, codes=self._weight.codes[ids], scales=self._weight.scales[ids])
        return dequantize(rows, self._dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"

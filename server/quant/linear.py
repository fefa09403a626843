"""A linear layer whose weight is quantized: takes nn.Linear's place, so that networks know nothing of bits."""

from __future__ import annotations

import torch

from server.kernels.ops import Ops, QuantWeight


class QuantLinear(torch.nn.Module):
    """y = x W^T + b with W as small integers; ``bias`` keeps nn.Linear's name, so a checkpoint finds it."""

    def __init__(self, weight: QuantWeight, bias: torch.nn.Parameter | None, ops: Ops):
        super().__init__()
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        self.bits = weight.bits
        self.bias = bias
        self._weight = ops.prepare(weight)
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.quant_linear(x, self._weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"

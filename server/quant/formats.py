"""The official int8 and int4 checkpoints."""

from __future__ import annotations

import torch

from server.kernels.ops import QuantWeight

# what the sixteen codes of an official int4 matrix stand for: two's complement
_OFFICIAL_INT4 = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.int8)


def from_official(codes: torch.Tensor, scales: torch.Tensor, in_features: int) -> QuantWeight:
    """The tensors of an official quantized checkpoint, unchanged: one scale per row is one group per row.

    codes int8 [out, in] or packed [out, in / 2]; scales [out] (quantization.py of THUDM/chatglm2-6b-int4). A row of
    zeros has scale 0 and meaningless codes there, which give zeros.
    """
    bits = 8 * codes.shape[1] // in_features
    table = _OFFICIAL_INT4 if bits == 4 else None
    return QuantWeight(codes, scales.float().unsqueeze(1), bits, in_features, in_features, table)

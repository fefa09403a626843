"""Quantized weights: making them group by group, and reading the official int8 and int4 checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.kernels.ops import QuantWeight

GROUP_SIZE = 32
# rows are worked on in blocks of about this many values, which stay in the processor's cache
_BLOCK_VALUES = 1 << 18


def quantize(weight: torch.Tensor, bits: int, group_size: int = GROUP_SIZE) -> QuantWeight:
    """Quantize a floating point matrix [out, in] symmetrically (no zero points) in groups along its rows.

    8 bits: scale = max|w| / 127. 4 bits: the codes of llama.cpp's Q4_0 (scale = the value of largest magnitude / -8,
    which uses all sixteen codes), then the scale that fits those codes best in least squares, so that no group's error
    is larger than Q4_0's. Where ``in`` is no multiple of ``group_size``, the last group is filled up with zeros.
    """
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    codes = torch.empty(rows, groups * group_size * bits // 8, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, groups, dtype=torch.float16, device=weight.device)
    fit = _fit_int8 if bits == 8 else _fit_int4
    step = max(1, _BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        padded = F.pad(weight[block].float(), (0, groups * group_size - columns))
        q, scales[block] = fit(padded.view(-1, groups, group_size))
        q = q.flatten(1).to(torch.int8)
        codes[block] = q if bits == 8 else pack_int4(q)
    return QuantWeight(codes, scales, bits, group_size, columns)


def from_official(codes: torch.Tensor, scales: torch.Tensor, in_features: int) -> QuantWeight:
    """The tensors of an official quantized checkpoint, unchanged: one scale per row is one group per row.

    codes int8 [out, in] or packed [out, in / 2]; scales [out] (quantization.py of THUDM/chatglm2-6b-int4). A row of
    zeros has scale 0 and meaningless codes there, which give zeros.
    """
    bits = 8 * codes.shape[1] // in_features
    scales = scales if scales.dtype == torch.float16 else scales.float()
    return QuantWeight(codes, scales.unsqueeze(1), bits, in_features, in_features)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes -8..7 [rows, n], n even, to packed bytes [rows, n / 2]; see QuantWeight."""
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def _fit_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and float16 scales of float32 groups [rows, groups, size]."""
    scale = _half(groups.abs().amax(-1) / 127)
    return _codes(groups, scale, -127, 127), scale


def _fit_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = _half(largest / -8)
    codes = _codes(groups, scale, -8, 7)
    # for fixed codes q the best scale is <w, q> / <q, q>; with it, the nearest codes are better still
    fitted = _half((groups * codes).sum(-1) / codes.square().sum(-1).clamp_(min=1))
    return _codes(groups, fitted, -8, 7), fitted


def _half(scale: torch.Tensor) -> torch.Tensor:
    """As the scale is stored, so that the codes are chosen for the value that they will be multiplied with."""
    return scale.to(torch.float16).float()


def _codes(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return (groups * inverse.unsqueeze(-1)).round_().clamp_(low, high)

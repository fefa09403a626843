"""Making quantized weights with plain torch, on any device; ``cpu/quantize.c`` does the same faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.kernels.ops import QuantWeight

GROUP_SIZE = {4: 64, 8: 32}  # columns that share a scale, by bits
# The values of a 4-bit code: those that leave normally distributed weights, in such groups and each group scaled as
# below, the least squared error (Lloyd's algorithm, rounded to int8). Denser around 0 than even steps.
INT4_TABLE = torch.tensor([-127, -98, -78, -61, -46, -33, -21, -10, 1, 13, 24, 37, 50, 65, 83, 107], dtype=torch.int8)
_CANDIDATES = [0.7 + 0.065 * i for i in range(8)]  # scales that are tried, as shares of the one for the largest value
_SMALLEST = 1e-30  # a group whose largest value is below this counts as zeros
# rows are worked on in blocks of about this many values, which stay in the processor's cache
_BLOCK_VALUES = 1 << 18


def quantize(weight: torch.Tensor, bits: int) -> QuantWeight:
    """Quantize a floating point matrix [out, in] in groups along its rows.

    8 bits: groups of 32, scale = max|w| / 127 in float16, 8.5 bits per weight, as llama.cpp's Q8_0.

    4 bits: groups of 64, codes are places in ``INT4_TABLE``; a group's scale is the one among several that leaves the
    least squared error, rounded to a multiple (-127 .. 127) of the row's largest / 127, so that it takes 8 bits to
    store: 4.125 bits per weight.

    Where ``in`` is no multiple of the group, the last one is filled up with zeros. A NaN or an infinity makes its group
    NaN, or its row where it has 4 bits.
    """
    rows, columns = weight.shape
    size = GROUP_SIZE[bits]
    groups = -(-columns // size)
    codes = torch.empty(rows, groups * size * bits // 8, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, groups, dtype=torch.float16 if bits == 8 else torch.float32, device=weight.device)
    fit = _fit_int8 if bits == 8 else _fit_int4
    step = max(1, _BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        padded = F.pad(weight[block].float(), (0, groups * size - columns))
        q, scales[block] = fit(padded.view(-1, groups, size))
        q = q.flatten(1)
        codes[block] = q if bits == 8 else pack_int4(q)
    return QuantWeight(codes, scales, bits, size, columns, INT4_TABLE if bits == 4 else None)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes of 4 bits [rows, n], n even, to packed bytes [rows, n / 2]; see QuantWeight."""
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def _fit_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales, which float16 can hold, of float32 groups [rows, groups, size]."""
    scale = (groups.abs().amax(-1) / 127).to(torch.float16).float()
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    codes = (groups * _inverse(scale)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def _fit_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in the table, int8, and scales float32, of float32 groups [rows, groups, size]."""
    table = INT4_TABLE.to(groups.device).float()
    borders = (table[1:] + table[:-1]) / 2
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # where the largest value comes to stand at the table's end, squares are neither too large nor too small for float32
    whole = torch.where(largest.abs() < _SMALLEST, 0, largest / table[0])
    scaled = groups * _inverse(whole)
    best = torch.zeros_like(largest)
    best_gain = torch.zeros_like(largest)
    for share in _CANDIDATES:
        values = table[torch.bucketize((scaled / share).contiguous(), borders)]
        # for given values v the best scale is <w, v> / <v, v>, and it lessens the squared error by <w, v>^2 / <v, v>
        product, square = (scaled * values).sum(-1), values.square().sum(-1)
        gain = product.square() / square
        better = gain > best_gain
        best, best_gain = torch.where(better, product / square, best), torch.where(better, gain, best_gain)
    best = torch.where(largest.isfinite(), best * whole, torch.nan)
    unit = best.abs().amax(1, keepdim=True) / 127
    scale = (best * _inverse(unit).squeeze(-1)).round_() * unit
    return torch.bucketize((groups * _inverse(scale)).contiguous(), borders).to(torch.int8), scale


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, or 0 for a scale of 0, with a dimension for the values of a group behind."""
    return torch.where(scale == 0, 0, 1 / scale).unsqueeze(-1)

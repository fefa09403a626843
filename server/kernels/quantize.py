"""Making quantized weights with plain torch, on any device; ``cpu/quantize.c`` does the same faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.kernels.ops import QuantWeight

GROUP_SIZE = 64  # columns that share a scale
# The values of a 4-bit code: those that leave normally distributed weights, in groups of 64 and each group scaled as below,
# the least squared error (Lloyd's algorithm, rounded to int8). Denser around 0 than the even steps of llama.cpp's Q4_0.
INT4_TABLE = torch.tensor(
    [-127, -98, -78, -61, -46, -33, -21, -10, 1, 13, 24, 37, 50, 65, 83, 107], dtype=torch.int8
)
_CANDIDATES = [0.7 + 0.065 * i for i in range(8)]  # scales that are tried, as shares of the one for the largest value
# rows are worked on in blocks of about this many values, which stay in the processor's cache
_BLOCK_VALUES = 1 << 18


def quantize(weight: torch.Tensor, bits: int) -> QuantWeight:
    """Quantize a floating point matrix [out, in] in groups of 64 along its rows.

    8 bits: scale = max|w| / 127 in float16, 8.25 bits per weight. 4 bits: codes are places in ``INT4_TABLE``; a group's
    scale is the one among several that leaves the least squared error, rounded to a multiple (-127 .. 127) of the row's
    largest / 127, so that it takes 8 bits to store: 4.125 bits per weight. Where ``in`` is no multiple of 64, the last group
    is filled up with zeros.
    """
    rows, columns = weight.shape
    groups = -(-columns // GROUP_SIZE)
    codes = torch.empty(rows, groups * GROUP_SIZE * bits // 8, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, groups, device=weight.device)
    fit = _fit_int8 if bits == 8 else _fit_int4
    step = max(1, _BLOCK_VALUES // columns)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        padded = F.pad(weight[block].float(), (0, groups * GROUP_SIZE - columns))
        q, scales[block] = fit(padded.view(-1, groups, GROUP_SIZE))
        q = q.flatten(1)
        codes[block] = q if bits == 8 else pack_int4(q)
    return QuantWeight(codes, scales, bits, GROUP_SIZE, columns, INT4_TABLE if bits == 4 else None)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes of 4 bits [rows, n], n even, to packed bytes [rows, n / 2]; see QuantWeight."""
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def _fit_int8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales float32, which float16 can hold, of float32 groups [rows, groups, size]."""
    scale = (groups.abs().amax(-1) / 127).to(torch.float16).float()
    codes = (groups * _inverse(scale)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def _fit_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    table = INT4_TABLE.to(groups.device).float()
    borders = (table[1:] + table[:-1]) / 2
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.zeros_like(largest)
    best_gain = torch.zeros_like(largest)
    for share in _CANDIDATES:
        values = table[_places(groups, largest * share / table[0], borders)]
        # for given values v the best scale is <w, v> / <v, v>, and it lessens the squared error by <w, v>^2 / <v, v>
        product, square = (groups * values).sum(-1), values.square().sum(-1)
        gain = product.square() / square
        better = gain > best_gain
        best, best_gain = torch.where(better, product / square, best), torch.where(better, gain, best_gain)
    unit = best.abs().amax(1, keepdim=True) / 127
    scale = (best * _inverse(unit).squeeze(-1)).round_() * unit
    return _places(groups, scale, borders).to(torch.int8), scale


def _places(groups: torch.Tensor, scale: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """Where in the table the nearest values stand."""
    return torch.bucketize((groups * _inverse(scale)).contiguous(), borders)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, or 0 for a scale of 0, with a dimension for the values of a group behind."""
    return torch.where(scale == 0, 0, 1 / scale).unsqueeze(-1)

"""Quantized matrices as the C kernels take them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property

import torch

TILE, GROUP = 16, 64  # rows and columns that lie together in cpu/tiles.h
MOST_DIM = 256  # values of a head that the attention kernel has room for


class Matrix(ctypes.Structure):
    """See cpu/matmul.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "row_scales", "table")]
    _fields_ += [("K", ctypes.c_int64), ("N", ctypes.c_int64)]


class Linear(ctypes.Structure):
    """See cpu/matmul.h; what is not given is 0: x itself is multiplied, and nothing added to what y holds."""

    _fields_ = [("matrix", Matrix), ("bias", ctypes.c_void_p), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p)]
    _fields_ += [("M", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("quantized", "x_scales", "x_offsets")]
    _fields_ += [("source", ctypes.c_int32), ("add", ctypes.c_int32)]
    _fields_ += [("norm", ctypes.c_void_p), ("eps", ctypes.c_float)]


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class TiledWeight:
    """A quantized matrix as cpu/tiles.h lays it out."""

    codes: torch.Tensor  # uint8
    scales: torch.Tensor  # int8 for 4 bits, float16 for 8
    row_scales: torch.Tensor | None  # float32, for 4 bits
    table: torch.Tensor | None  # int8 [16], for 4 bits
    in_features: int
    out_features: int

    @property
    def bits(self) -> int:
        return 8 if self.table is None else 4

    @cached_property
    def matrix(self) -> Matrix:
        """Valid as long as the weight lives."""
        pointers = (pointer(tensor) for tensor in (self.codes, self.scales, self.row_scales, self.table))
        return Matrix(*pointers, self.in_features, self.out_features)


class Activations:
    """Space for ``rows`` rows of ``width`` activations as int8, with a scale and two offsets for each 64 of them."""

    def __init__(self, rows: int, width: int):
        groups = -(-width // GROUP)
        self._quantized = torch.empty(rows, groups * GROUP, dtype=torch.int8)
        self._scales = torch.empty(rows, groups)
        self._offsets = torch.empty(rows, groups, 2, dtype=torch.int32)

    @property
    def pointers(self) -> tuple[int, int, int]:
        """As they stand in ``Linear``; valid as long as this lives."""
        return self._quantized.data_ptr(), self._scales.data_ptr(), self._offsets.data_ptr()

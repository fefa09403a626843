"""The back end for CPUs: C kernels for float32 activations and quantized weights, called through ctypes.

What they do not take (other dtypes, unquantized matrices, odd shapes) plain torch computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from server.kernels.build import VARIANTS, NoKernels, load_library
from server.kernels.cpu_decoder import CpuDecoder
from server.kernels.cpu_weights import GROUP, MOST_DIM, TILE, Activations, Linear, TiledWeight, pointer
from server.kernels.ops import DecoderLayer, QuantWeight
from server.kernels.quantize import GROUP_SIZE, INT4_TABLE
from server.kernels.torch_ops import TorchOps

_ROWS_AT_ONCE = 1024  # of a matrix that is quantized: its float32 copy is small beside the matrix


class _RmsNorm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight", "y")]
    _fields_ += [("rows", ctypes.c_int64), ("width", ctypes.c_int64), ("eps", ctypes.c_float)]


class _Swiglu(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64), ("width", ctypes.c_int64)]


class _Rotary(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("cos_sin", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "heads", "dim", "pairs", "stride")]


_ATTENTION_SIZES = ("n", "heads", "groups", "length", "dim", "stride", "query_stride", "context")


class _Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "key", "value", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in _ATTENTION_SIZES]


class _Quantize(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "table", "codes", "scales")]
    _fields_ += [("rows", ctypes.c_int64), ("columns", ctypes.c_int64)]


class _Pack(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "tiles")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "groups", "bits")]


class CpuOps(TorchOps):
    """See ``kernels.ops.Ops``. Activations are float32, keys and values float16.

    The threads are the process', not the object's: the newest object says how many.
    """

    storage = torch.float16
    dense_bits = 8  # half as much to read as 16 bits, and a tenth of the error of 4

    def __init__(self, threads: int, variant: str | None = None):
        """``variant``: one of ``build.VARIANTS`` instead of the best that this processor has.

        Raises NoKernels where the kernels cannot be compiled, or not for this variant or processor.
        """
        library = load_library()
        usable = [name for name in VARIANTS if _runs(library, name)]
        if variant and variant not in usable:
            raise NoKernels(f"this processor or compiler has no {variant}, only {', '.join(usable)}")
        self.variant = variant or usable[0]
        self.name = f"cpu-{self.variant}"
        self.threads = library.set_threads(threads)
        self._call = {
            name: getattr(library, f"{name}_{self.variant}")
            for name in ("linear", "rms_norm", "swiglu", "rotary", "attention", "decoder", "quantize_int4", "pack")
        }

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if not _floats(x, weight) or weight.shape != x.shape[1:]:
            return super().rms_norm(x, weight, eps)
        y = torch.empty_like(x)
        self._run("rms_norm", _RmsNorm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, eps))
        return y

    def rotary_interleaved(self, x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
        (rows, heads, dim), pairs = x.shape, cos_sin.shape[1]
        fits = cos_sin.shape == (rows, pairs, 2) and 2 * pairs <= dim and x.stride()[1:] == (dim, 1)
        if x.dtype != torch.float32 or not _floats(cos_sin) or not fits:
            return super().rotary_interleaved(x, cos_sin)
        self._run("rotary", _Rotary(x.data_ptr(), cos_sin.data_ptr(), rows, heads, dim, pairs, x.stride(0)))
        return x

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        if not _floats(x):
            return super().swiglu(x)
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        self._run("swiglu", _Swiglu(x.data_ptr(), y.data_ptr(), rows, width))
        return y

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, context: int = 0
    ) -> torch.Tensor:
        (n, heads, dim), (groups, length, _) = query.shape, key.shape
        halves = key.dtype == value.dtype == torch.float16 and query.dtype == torch.float32
        alike = key.shape == value.shape == (groups, length, dim) and key.stride() == value.stride()
        if not halves or not alike or key.stride()[1:] != (dim, 1) or dim > MOST_DIM or n > length:
            return super().attention(query, key, value, context=context)
        if query.stride()[1:] != (dim, 1):
            query = query.contiguous()
        y = query.new_empty(n, heads * dim)
        pointers = (tensor.data_ptr() for tensor in (query, key, value, y))
        sizes = (n, heads, groups, length, dim, key.stride(0), query.stride(0), min(context, length))
        self._run("attention", _Attention(*pointers, *sizes))
        return y

    def quantize(self, weight: torch.Tensor, bits: int) -> QuantWeight:
        if bits != 4:
            return super().quantize(weight, bits)
        rows, columns = weight.shape
        groups = -(-columns // GROUP_SIZE[4])
        codes = torch.empty(rows, groups * GROUP_SIZE[4] // 2, dtype=torch.int8)
        scales = torch.empty(rows, groups)
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = weight[start : start + _ROWS_AT_ONCE].float().contiguous()
            pointers = (tensor.data_ptr() for tensor in (block, INT4_TABLE, codes[start:], scales[start:]))
            self._run("quantize_int4", _Quantize(*pointers, len(block), columns))
        return QuantWeight(codes, scales, 4, GROUP_SIZE[4], columns, INT4_TABLE)

    def prepare(self, weight: QuantWeight) -> TiledWeight | QuantWeight:
        groups = -(-weight.in_features // GROUP)
        stored = weight.scales.shape[1]
        if stored > 1 and weight.group_size != GROUP_SIZE[weight.bits]:
            return weight
        tiles = -(-weight.out_features // TILE)
        codes = torch.zeros(weight.out_features, groups * GROUP * weight.bits // 8, dtype=torch.int8)
        codes[:, : weight.codes.shape[1]] = weight.codes
        packed = torch.empty(tiles * groups * GROUP * TILE * weight.bits // 8, dtype=torch.uint8)
        self._run("pack", _Pack(codes.data_ptr(), packed.data_ptr(), weight.out_features, groups, weight.bits))
        per_row = groups * GROUP // GROUP_SIZE[weight.bits]
        scales = torch.zeros(tiles * TILE, per_row)
        scales[: weight.out_features, : per_row if stored == 1 else stored] = weight.scales
        row_scales = None
        if weight.bits == 4:
            row_scales = scales.abs().amax(1) / 127
            scales = torch.where(row_scales.unsqueeze(1) == 0, 0, scales / row_scales.unsqueeze(1)).round()
        tiled = scales.view(tiles, TILE, per_row).transpose(1, 2).contiguous()
        tiled = tiled.to(torch.int8 if weight.bits == 4 else torch.float16)
        return TiledWeight(packed, tiled, row_scales, weight.table, weight.in_features, weight.out_features)

    def quant_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(weight, QuantWeight):
            return super().quant_linear(x, weight, bias)
        dtype, x = x.dtype, x.float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        if x.shape[1] != weight.in_features or (bias is not None and len(bias) != weight.out_features):
            raise ValueError(f"{list(x.shape)} times a matrix of {weight.out_features} x {weight.in_features}")
        rows, space = x.shape[0], Activations(x.shape[0], weight.in_features)
        y = x.new_empty(rows, weight.out_features)
        arguments = Linear(weight.matrix, pointer(bias), x.data_ptr(), y.data_ptr(), rows, *space.pointers)
        self._run("linear", arguments)
        return y.to(dtype)

    def decoder(self, layers: Sequence[DecoderLayer]) -> CpuDecoder | None:
        return CpuDecoder(layers, self._call["decoder"]) if CpuDecoder.takes(layers) else None

    def _run(self, name: str, arguments: ctypes.Structure) -> None:
        self._call[name](ctypes.byref(arguments))


def _runs(library: ctypes.CDLL, variant: str) -> bool:
    """Whether the library holds a variant and this processor has what it needs."""
    return hasattr(library, f"linear_{variant}") and bool(getattr(library, f"supports_{variant}")())


def _floats(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)

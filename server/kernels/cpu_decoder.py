"""All layers of ChatGLM2 in one call of the C kernels; see cpu/decoder.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from server.kernels.cpu_weights import MOST_DIM, Activations, Matrix, TiledWeight, pointer
from server.kernels.ops import DecoderLayer

_MATRICES = ("query_key_value", "dense", "h_to_4h", "to_h")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("input_norm", "post_attention_norm", "bias")]
    _fields_ += [(name, Matrix) for name in _MATRICES]


class _Segment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("first_row", "length", "start", "slot")]


_SIZES = ("layer_count", "segment_count", "rows", "heads", "groups", "dim", "pairs")
_STRIDES = ("layer_stride", "slot_stride", "group_stride")
_SPACE = ("fused", "attended", "inner", "quantized", "x_scales", "x_offsets")


class _Decoder(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer)), ("segments", ctypes.POINTER(_Segment))]
    _fields_ += [(name, ctypes.c_int64) for name in _SIZES]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "cos_sin", "keys", "values")]
    _fields_ += [(name, ctypes.c_int64) for name in _STRIDES]
    _fields_ += [(name, ctypes.c_void_p) for name in _SPACE]
    _fields_ += [("eps", ctypes.c_float)]


class CpuDecoder:
    """See ``kernels.ops.Decoder``. Takes float32 activations and a float16 cache."""

    def __init__(self, layers: Sequence[DecoderLayer], call: Callable[[ctypes._Pointer], None]):
        """``layers`` that ``takes`` said yes to."""
        self._layers = layers  # whose tensors the pointers below point into
        self._first = layers[0]
        self._call = call
        self._biases = [None if layer.bias is None else layer.bias.float().contiguous() for layer in layers]
        self._array = (_Layer * len(layers))(*map(_layer, layers, self._biases))
        self._widest = max(self._first.dense.in_features, self._first.h_to_4h.in_features, self._first.to_h.in_features)

    @staticmethod
    def takes(layers: Sequence[DecoderLayer]) -> bool:
        """Whether everything is quantized in the kernels' layout, and fits together."""
        return bool(layers) and all(_fits(layer, layers[0]) for layer in layers)

    def __call__(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        segments: Sequence[tuple[int, int, int]],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor | None:
        self._check(x, cos_sin, segments, keys)
        floats = x.dtype == cos_sin.dtype == torch.float32
        halves = keys.dtype == values.dtype == torch.float16 and keys.stride() == values.stride()
        if not floats or not halves or keys.stride()[3:] != (keys.shape[4], 1):
            return None
        first, rows, pairs = self._first, x.shape[0], cos_sin.shape[1]
        x, cos_sin = x.clone(memory_format=torch.contiguous_format), cos_sin.contiguous()
        heads, groups, dim = first.heads, first.groups, first.head_dim
        fused, attended = x.new_empty(rows, heads + 2 * groups, dim), x.new_empty(rows, heads, dim)
        inner, space = x.new_empty(rows, first.h_to_4h.out_features), Activations(rows, self._widest)
        sizes = (len(self._array), len(segments), rows, heads, groups, dim, pairs)
        pointers = (tensor.data_ptr() for tensor in (x, cos_sin, keys, values))
        scratch = (tensor.data_ptr() for tensor in (fused, attended, inner))
        places, row = (_Segment * len(segments))(), 0
        for i, (slot, start, length) in enumerate(segments):
            places[i] = _Segment(row, length, start, slot)
            row += length
        arguments = _Decoder(
            self._array, places, *sizes, *pointers, *keys.stride()[:3], *scratch, *space.pointers, first.eps
        )
        self._call(ctypes.byref(arguments))
        return x

    def _check(
        self, x: torch.Tensor, cos_sin: torch.Tensor, segments: Sequence[tuple[int, int, int]], keys: torch.Tensor
    ) -> None:
        """The kernels write where they are told: a place outside the cache must be an error before."""
        first, rows = self._first, len(x)
        layers, slots, groups, places, dim = keys.shape
        if (layers, groups, dim) != (len(self._array), first.groups, first.head_dim):
            raise ValueError(f"keys {list(keys.shape)} are not of {len(self._array)} such layers")
        if x.shape[1] != len(first.input_norm) or len(cos_sin) != rows or 2 * cos_sin.shape[1] > dim:
            raise ValueError(f"{list(x.shape)} rows with angles {list(cos_sin.shape)}")
        if sum(length for *_, length in segments) != rows:
            raise ValueError(f"{rows} rows for segments of {[length for *_, length in segments]}")
        for slot, start, length in segments:
            if not 0 <= slot < slots or start < 0 or length < 0 or start + length > places:
                raise ValueError(f"{length} rows behind {start} in slot {slot} of {slots}, which has {places} places")


def _layer(layer: DecoderLayer, bias: torch.Tensor | None) -> _Layer:
    norms = (layer.input_norm.data_ptr(), layer.post_attention_norm.data_ptr())
    return _Layer(*norms, pointer(bias), *(getattr(layer, name).matrix for name in _MATRICES))


def _fits(layer: DecoderLayer, first: DecoderLayer) -> bool:
    if not all(isinstance(getattr(layer, name), TiledWeight) for name in _MATRICES) or layer.head_dim > MOST_DIM:
        return False
    norms = (layer.input_norm, layer.post_attention_norm)
    hidden, inner = len(first.input_norm), first.to_h.in_features
    width = (layer.heads + 2 * layer.groups) * layer.head_dim
    shapes = {"query_key_value": (width, hidden), "dense": (hidden, layer.heads * layer.head_dim)}
    shapes |= {"h_to_4h": (2 * inner, hidden), "to_h": (hidden, inner)}
    weights = ((getattr(layer, name), shape) for name, shape in shapes.items())
    return (
        all(getattr(layer, name) == getattr(first, name) for name in ("heads", "groups", "head_dim", "eps"))
        and all((weight.out_features, weight.in_features) == shape for weight, shape in weights)
        and all(norm.dtype == torch.float32 and norm.is_contiguous() and len(norm) == hidden for norm in norms)
        and (layer.bias is None or len(layer.bias) == width)
    )

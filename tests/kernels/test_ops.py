"""Every operation against its formula, written out in float64; any back end can be put in the place of TorchOps.

Shapes are odd on purpose: one row, one head, sizes that are no power of two, tensors that are parts of others.
"""

import math

import pytest
import torch
from safetensors.torch import load_file

from server.kernels.torch_ops import TorchOps, dequantize
from server.quant.formats import quantize
from tests.oracle import oracle_file

OPS = [TorchOps()]
EPS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

back_end = pytest.mark.parametrize("ops", OPS, ids=lambda ops: ops.name)
all_dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(actual, expected):
    """``expected`` is float64; the result is its rounding to the dtype, give or take one."""
    assert actual.shape == expected.shape
    tolerance = EPS[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@back_end
@all_dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 4), (3, 33), (17, 4096), (0, 8)])
def test_rms_norm(ops, dtype, rows, size):
    x, weight = random(rows, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1)
    wide, w = x.double(), weight.double()
    near(ops.rms_norm(x, weight, 1e-5), wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)


@back_end
def test_rms_norm_does_not_overflow_in_half_precision(ops):
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    near(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones(1, 64, dtype=torch.float64))


@back_end
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rms_norm_as_official(ops, dtype):
    stored = load_file(oracle_file("ops", "ops.safetensors"))
    x, weight, expected = (stored[f"rmsnorm.{dtype}.{name}"] for name in ("x", "weight", "chatglm2_3"))
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)


@back_end
@all_dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "width"), [(1, 1, 4, 2), (5, 3, 16, 8), (9, 34, 128, 64), (2, 2, 8, 8)]
)
def test_rotary_interleaved(ops, dtype, rows, heads, dim, width):
    # heads of a fused projection: rows lie further apart than heads * dim
    fused = random(rows, heads + 2, dim, dtype=dtype)
    angles = random(rows, width // 2, seed=2) * 100
    cos_sin = torch.stack([angles.cos(), angles.sin()], dim=-1)
    expected = fused.double().clone()
    for row in range(rows):
        for head in range(heads):
            for t in range(width // 2):
                a, b = (fused[row, head, 2 * t + i].double() for i in (0, 1))
                cos, sin = cos_sin[row, t].double()
                expected[row, head, 2 * t] = a * cos - b * sin
                expected[row, head, 2 * t + 1] = b * cos + a * sin
    turned = ops.rotary_interleaved(fused[:, :heads], cos_sin)
    assert turned.data_ptr() == fused.data_ptr()
    near(fused, expected)


@back_end
def test_rotary_as_official(ops):
    stored = load_file(oracle_file("ops", "ops.safetensors"))
    x, positions = stored["apply.x"], stored["apply.position_ids"]  # [seq, batch, heads, dim], [batch, seq]
    frequencies = 10000 ** -(torch.arange(0, 16, 2) / 16)
    for row in range(x.shape[1]):
        angles = torch.outer(positions[row].float(), frequencies)
        cos_sin = torch.stack([angles.cos(), angles.sin()], dim=-1)
        turned = ops.rotary_interleaved(x[:, row].clone(), cos_sin)
        torch.testing.assert_close(turned, stored["apply.out"][:, row], atol=1e-5, rtol=0)


@back_end
@all_dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 13), (33, 1370), (0, 6)])
def test_swiglu(ops, dtype, rows, size):
    x = random(rows, 2 * size, dtype=dtype) * 4
    gate, up = x.double().split(size, dim=-1)
    near(ops.swiglu(x), gate / (1 + (-gate).exp()) * up)


def naive_attention(query, key, value, context):
    n, heads, dim = query.shape
    groups, length, _ = key.shape
    out = torch.zeros(n, heads, dim, dtype=torch.float64)
    for row in range(n):
        seen = max(length - n + row + 1, context)
        for head in range(heads):
            group = head // (heads // groups)
            scores = key[group, :seen].double() @ query[row, head].double() / math.sqrt(dim)
            out[row, head] = scores.softmax(0) @ value[group, :seen].double()
    return out.flatten(1)


@back_end
@all_dtypes
@pytest.mark.parametrize(
    ("n", "length", "heads", "groups", "dim", "context"),
    [
        (1, 1, 1, 1, 4, 0),
        (1, 7, 6, 2, 16, 0),
        (1, 300, 32, 2, 128, 0),
        (5, 5, 6, 2, 16, 0),
        (33, 33, 8, 1, 128, 0),
        (3, 40, 6, 3, 8, 0),
        (17, 81, 32, 2, 128, 0),
        (6, 6, 4, 4, 8, 5),
        (6, 6, 4, 4, 8, 6),
        (4, 9, 4, 4, 8, 7),
        (1, 9, 4, 4, 8, 5),
    ],
)
def test_attention(ops, dtype, n, length, heads, groups, dim, context):
    fused = random(n, heads + 2, dim, dtype=dtype)
    query = fused[:, :heads]  # as the network gives it: rows lie apart
    # as a cache gives them: each group's keys contiguous, the groups apart
    key = random(groups, length + 9, dim, dtype=dtype, seed=1)[:, :length]
    value = random(groups, length + 9, dim, dtype=dtype, seed=2)[:, :length]
    near(ops.attention(query, key, value, context=context), naive_attention(query, key, value, context))


@back_end
@all_dtypes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "out", "size", "group"), [(1, 3, 5, 32), (7, 65, 96, 32), (40, 33, 130, 64), (0, 4, 8, 8)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_quant_linear(ops, dtype, bits, rows, out, size, group, biased):
    weight = quantize(random(out, size), bits, group)
    x = random(rows, size, dtype=dtype, seed=1)
    bias = random(out, dtype=dtype, seed=2) if biased else None
    expected = x.double() @ dequantize(weight, torch.float64).T + (bias.double() if biased else 0)
    actual = ops.quant_linear(x, ops.prepare(weight), bias)
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype] * math.sqrt(size)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


@back_end
def test_quant_linear_over_more_than_one_block(ops):
    weight = quantize(random(5000, 1024), 4)
    x = random(2, 1024, seed=1)
    expected = x.double() @ dequantize(weight, torch.float64).T
    torch.testing.assert_close(ops.quant_linear(x, ops.prepare(weight), None).double(), expected, atol=1e-3, rtol=0)

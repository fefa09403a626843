"""Every operation between the matrices against its formula, written out in float64, in every back end.

Shapes are odd on purpose: one row, one head, sizes that are no power of two, tensors that are parts of others.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from server.kernels.build import VARIANTS
from tests.kernels.conftest import cpu_ops
from tests.oracle import oracle_file

EPS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

all_dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)


def near(actual, expected):
    """``expected`` is float64; the result is its rounding to the dtype, give or take one."""
    assert actual.shape == expected.shape
    tolerance = EPS[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@all_dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 4), (3, 33), (17, 4096), (0, 8)])
def test_rms_norm(ops, random, dtype, rows, size):
    x, weight = random(rows, size, dtype=dtype) * 3, random(size, dtype=dtype)
    wide, w = x.double(), weight.double()
    near(ops.rms_norm(x, weight, 1e-5), wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w)


def test_rms_norm_does_not_overflow_in_half_precision(ops):
    x = torch.full((1, 64), 3e4, dtype=torch.float16)
    near(ops.rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones(1, 64, dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rms_norm_as_official(ops, dtype):
    stored = load_file(oracle_file("ops", "ops.safetensors"))
    x, weight, expected = (stored[f"rmsnorm.{dtype}.{name}"] for name in ("x", "weight", "chatglm2_3"))
    torch.testing.assert_close(ops.rms_norm(x.flatten(0, -2), weight, 1e-5), expected.flatten(0, -2))


@all_dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "width"), [(1, 1, 4, 2), (5, 3, 16, 8), (9, 34, 128, 64), (2, 2, 8, 8), (0, 2, 8, 4)]
)
def test_rotary_interleaved(ops, random, dtype, rows, heads, dim, width):
    # heads of a fused projection: rows lie further apart than heads * dim
    fused = random(rows, heads + 2, dim, dtype=dtype)
    angles = random(rows, width // 2) * 100
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


def test_rotary_as_official(ops):
    stored = load_file(oracle_file("ops", "ops.safetensors"))
    x, positions = stored["apply.x"], stored["apply.position_ids"]  # [seq, batch, heads, dim], [batch, seq]
    frequencies = 10000 ** -(torch.arange(0, 16, 2) / 16)
    for row in range(x.shape[1]):
        angles = torch.outer(positions[row].float(), frequencies)
        cos_sin = torch.stack([angles.cos(), angles.sin()], dim=-1)
        turned = ops.rotary_interleaved(x[:, row].clone(), cos_sin)
        torch.testing.assert_close(turned, stored["apply.out"][:, row], atol=1e-5, rtol=0)


@all_dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 13), (33, 1370), (0, 6)])
def test_swiglu(ops, random, dtype, rows, size):
    x = random(rows, 2 * size, dtype=dtype) * 4
    gate, up = x.double().split(size, dim=-1)
    near(ops.swiglu(x), gate / (1 + (-gate).exp()) * up)


def test_exponential_in_swiglu(ops):
    gate = torch.linspace(-80, 80, 20001)
    wide = gate.double()
    expected = wide / (1 + (-wide).exp())
    actual = ops.swiglu(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))[0]
    assert ((actual - expected).abs() <= (5e-7 + 6e-8 * wide.abs()) * expected.abs()).all()


def test_swiglu_of_values_beyond_the_exponentials_range(ops):
    gate = torch.tensor([-88.5, -100, -1e30, -3e38, 88.5, 100, 1e30, torch.inf, torch.nan])
    actual = ops.swiglu(torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0))[0]
    assert (actual[:4].abs() < 1e-35).all()
    assert torch.equal(actual[4:8], gate[4:8]) and actual[8].isnan()


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


def cached(random, groups, length, dim, dtype):
    """Keys or values as a cache gives them: each group's contiguous, the groups apart."""
    return random(groups, length + 9, dim, dtype=dtype)[:, :length]


@pytest.mark.parametrize(
    ("dtype", "stored"), [*((dtype, dtype) for dtype in EPS), (torch.float32, torch.float16)], ids=str
)
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
        (2, 33, 3, 1, 300, 0),
        (6, 6, 4, 4, 8, 5),
        (6, 6, 4, 4, 8, 6),
        (4, 9, 4, 4, 8, 7),
        (1, 9, 4, 4, 8, 5),
    ],
)
def test_attention(ops, random, dtype, stored, n, length, heads, groups, dim, context):
    fused = random(n, heads + 2, dim, dtype=dtype)
    query = fused[:, :heads]  # as the network gives it: rows lie apart
    key, value = (cached(random, groups, length, dim, stored) for _ in range(2))
    near(ops.attention(query, key, value, context=context), naive_attention(query, key, value, context))


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_attention_of_any_shape(variant, data):
    length = data.draw(st.integers(1, 100), "length")
    n = data.draw(st.integers(1, length), "n")
    groups, shared = data.draw(st.integers(1, 3), "groups"), data.draw(st.integers(1, 9), "shared")
    dim, context = data.draw(st.integers(1, 40), "dim"), data.draw(st.integers(0, length), "context")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    query = torch.randn(n, groups * shared, dim, generator=generator)
    key, value = torch.randn(2, groups, length, dim, generator=generator).half()
    actual = cpu_ops(variant).attention(query, key, value, context=context)
    near(actual, naive_attention(query, key, value, context))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_attention_shows_nan_and_infinity_to_those_who_see_them(cpu, random, bad):
    query = random(6, 4, 16)
    key, value = (cached(random, 2, 40, 16, torch.float16) for _ in range(2))
    good = cpu.attention(query, key, value).view(6, 4, 16)
    value[0, 37] = bad  # the fourth of the six rows is the first to see it, and only its first two heads
    actual = cpu.attention(query, key, value).view(6, 4, 16)
    assert not actual[3:, :2].isfinite().any()
    assert torch.equal(actual[:3], good[:3]) and torch.equal(actual[:, 2:], good[:, 2:])


def test_attention_of_an_infinite_query(cpu, random):
    key, value = (cached(random, 1, 3, 4, torch.float16) for _ in range(2))
    assert cpu.attention(torch.full((1, 1, 4), torch.inf), key, value).isnan().all()
    key[:] = -key.abs()
    assert cpu.attention(torch.full((1, 1, 4), torch.inf), key, value).isnan().all()


def test_huge_scores(ops, random):
    """Far below float32's largest exponent, far above that of e^x."""
    query = random(3, 2, 8) * 1e12
    key, value = (cached(random, 1, 20, 8, torch.float16) for _ in range(2))
    near(ops.attention(query, key, value), naive_attention(query, key, value, 0))

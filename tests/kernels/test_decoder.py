"""All layers in one call of the kernels against the same layers operation by operation."""

import pytest
import torch
from torch import nn

from server.engine.kv_cache import KVCache
from server.models.base import KVShape, Segment
from server.models.chatglm2.model import Encoder, NetworkConfig, Rotary
from server.quant.linear import QuantLinear

# hidden size, heads, key and value heads, values per head, inner size; sizes that no block divides, and real ones
SHAPES = [(40, 6, 2, 20, 50), (64, 4, 1, 16, 176), (256, 32, 2, 128, 130), (72, 3, 3, 24, 64)]

# a prompt, a token each behind some others, chunks beside each other, more rows than the kernels take at once, none
STEPS = [
    [Segment(0, 0, 5)],
    [Segment(2, 7, 1), Segment(0, 5, 1)],
    [Segment(1, 0, 11), Segment(0, 6, 3)],
    [Segment(0, 9, 70), Segment(2, 8, 1)],
    [Segment(1, 11, 0)],
]


def encoder(ops, random, shape, bits, bias=True):
    hidden, heads, groups, dim, inner = shape
    config = NetworkConfig(3, hidden, heads, groups, dim, inner, 100, 64, 1e-5, bias, 1.0)
    made = Encoder(config, ops)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            weight = random(module.out_features, module.in_features) / module.in_features**0.5
            values = None if module.bias is None else nn.Parameter(random(module.out_features), requires_grad=False)
            made.set_submodule(name, QuantLinear(ops.prepare(ops.quantize(weight, bits)), values, ops))
        elif hasattr(module, "weight"):
            module.weight = nn.Parameter(random(hidden), requires_grad=False)
    return made


def kv_cache(random, shape, places=80, prefix=3, dtype=torch.float16):
    """Three slots behind a P-tuning prefix, all places holding what earlier sequences left."""
    _, _, groups, dim, _ = shape
    parts = tuple(random(3, prefix, groups, dim) for _ in range(2))
    cache = KVCache(KVShape(3, groups, dim), 3, places, dtype, "cpu", parts)
    for tensor in (cache.keys, cache.values):
        tensor[..., prefix:, :] = random(*tensor[..., prefix:, :].shape)
    return cache


def one_by_one(made, x, cos_sin, segments, cache):
    for layer in made.layers:
        x = layer(x, cos_sin, segments, cache)
    return x


def near(actual, expected):
    """Row by row: a key at the border of two float16 values may fall on either side, and with it some int8 codes of
    every row that looks at it, of which a few make 2% in a row as short as these."""
    error = (actual.float() - expected.float()).norm(dim=-1)
    assert (error < 0.05 * expected.float().norm(dim=-1)).all(), error.max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_one_call_is_layer_after_layer(cpu, random, shape, bits):
    made, cache = encoder(cpu, random, shape, bits), kv_cache(random, shape)
    copy = kv_cache(random, shape)
    copy.keys, copy.values = cache.keys.clone(), cache.values.clone()
    rotary = Rotary(shape[3] // 2)
    for segments in STEPS:
        x = random(sum(segment.length for segment in segments), shape[0])
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in segments])
        given = x.clone()
        cos_sin = rotary.cos_sin(positions)
        assert made._decoder is not None
        actual, expected = made(x, cos_sin, segments, cache), one_by_one(made, x, cos_sin, segments, copy)
        assert torch.equal(x, given)
        near(actual, expected)
        near(cache.keys, copy.keys)
        near(cache.values, copy.values)


@torch.inference_mode()
def test_a_sequence_does_not_see_another(cpu, random):
    shape = SHAPES[0]
    made, cache, rotary = encoder(cpu, random, shape, 4), kv_cache(random, shape), Rotary(10)
    x, segments = random(2, shape[0]), [Segment(0, 4, 1), Segment(1, 4, 1)]
    cos_sin = rotary.cos_sin(torch.tensor([4, 4]))
    before = made(x, cos_sin, segments, cache)
    cache.keys[:, 1], cache.values[:, 1] = torch.nan, torch.nan
    after = made(x, cos_sin, segments, cache)
    assert torch.equal(before[0], after[0]) and after[1].isnan().all()


@torch.inference_mode()
def test_what_it_does_not_take_is_computed_layer_by_layer(cpu, random):
    shape = SHAPES[1]
    made, cache = encoder(cpu, random, shape, 8), kv_cache(random, shape, dtype=torch.float32)
    x, cos_sin, segments = random(2, shape[0]), Rotary(8).cos_sin(torch.arange(2)), [Segment(0, 0, 2)]
    copy = kv_cache(random, shape, dtype=torch.float32)
    copy.keys, copy.values = cache.keys.clone(), cache.values.clone()
    assert made._decoder(x, cos_sin, [(0, 3, 2)], cache.keys, cache.values) is None
    assert torch.equal(made(x, cos_sin, segments, cache), one_by_one(made, x, cos_sin, segments, copy))


BEYOND = [[(0, 80, 4)], [(3, 3, 4)], [(-1, 3, 4)], [(0, -1, 4)], [(0, 3, 3)], [(0, 3, 5), (1, 3, -1)]]


@pytest.mark.parametrize("segments", BEYOND, ids=str)
@torch.inference_mode()
def test_nothing_is_written_beside_the_cache(cpu, random, segments):
    shape = SHAPES[1]
    made, cache = encoder(cpu, random, shape, 4), kv_cache(random, shape)  # 3 slots of 3 + 80 places
    before = cache.keys.clone()
    with pytest.raises(ValueError, match=r"rows|places"):
        made._decoder(random(4, shape[0]), Rotary(8).cos_sin(torch.arange(4)), segments, cache.keys, cache.values)
    assert torch.equal(cache.keys, before)


def test_one_matrix_that_is_not_quantized_is_enough_to_leave_it(cpu, random):
    made = encoder(cpu, random, SHAPES[1], 4)
    assert made._decoder is not None
    other = encoder(cpu, random, SHAPES[1], 4)
    other.layers[1].mlp.dense_h_to_4h = nn.Linear(SHAPES[1][0], 2 * SHAPES[1][4])
    assert other._decoder is None


@torch.inference_mode()
def test_infinities_and_tiny_values_are_stored_as_torch_stores_them(cpu, random):
    """Float to half, which the plain variant does by hand: the values of one layer's keys, through its bias alone."""
    edges = [0.0, -0.0, 1e-8, 2.9e-8, 3.1e-8, 5.96e-8, 6.0e-5, 6.1e-5, -6.1035e-5, 1.0, 1.0004883, 1.0009765, 65504.0]
    edges += [65519.9, 65520.0, -1e9, float("inf"), float("-inf"), float("nan")]
    shape = (64, 2, 1, 64, 64)
    made = encoder(cpu, random, shape, 8)
    fused = made.layers[0].self_attention.query_key_value
    fused.weight.scales.zero_()
    values = torch.tensor(edges + random(64 - len(edges)).tolist())
    fused.bias[-64:] = values
    cache = kv_cache(random, shape)
    made(random(1, 64), Rotary(32).cos_sin(torch.tensor([0])), [Segment(0, 0, 1)], cache)
    torch.testing.assert_close(cache.values[0, 0, 0, 3], values.half(), atol=0, rtol=0, equal_nan=True)

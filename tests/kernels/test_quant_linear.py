"""Quantized matrices times activations.

TorchOps multiplies what the codes stand for; the C kernels also round the activations to int8, in groups of 64. They
are held against the exact product with activations rounded so, and against a bound on what the rounding may change.
"""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels.build import VARIANTS
from server.kernels.ops import QuantWeight
from server.kernels.torch_ops import TorchOps, dequantize
from server.quant.formats import from_official
from tests.kernels.conftest import cpu_ops

# rows of x, out, in: ChatGLM's matrices at a sixteenth of their size, decoding and reading, and odd ones
SHAPES = [
    (1, 288, 256),  # ChatGLM2's and ChatGLM3's query_key_value
    (3, 1712, 256),  # dense_h_to_4h
    (8, 256, 856),  # dense_4h_to_h
    (2, 4064, 256),  # output_layer
    (70, 768, 256),  # ChatGLM-6B's query_key_value
    (1, 1, 1),
    (1, 17, 63),
    (5, 3, 1),
    (9, 1, 65),
    (64, 16, 64),
    (65, 33, 129),
    (131, 15, 7),
    (0, 20, 64),
]
every_shape = pytest.mark.parametrize(("rows", "out", "size"), SHAPES)
both_bits = pytest.mark.parametrize("bits", [4, 8])


def grouped(x):
    """[rows, groups, 64], zeros behind the end."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))


def without_ties(x):
    """x with values in the middle between two codes moved to a code: rounding errors must not decide."""
    parts = grouped(x.double())
    step = parts.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step == 0, 0, parts / step)
    tie = (codes - codes.floor() - 0.5).abs() < 1e-3
    return torch.where(tie, codes.round() * step, parts).flatten(1)[:, : x.shape[1]].float()


def rounded(x):
    """What the kernels make of x: int8 codes in groups of 64, in float64."""
    parts = grouped(x.double())
    step = parts.abs().amax(-1, keepdim=True) / 127
    return (torch.where(step == 0, 0, parts / step).round() * step).flatten(1)[:, : x.shape[1]]


def check(ops, weight, x, bias):
    """Within float32's rounding of the exact product with rounded activations, and that near the one without."""
    matrix = dequantize(weight, torch.float64)
    actual = ops.quant_linear(x, ops.prepare(weight), bias).double()
    offset = 0 if bias is None else bias.double()
    assert actual.shape == (x.shape[0], weight.out_features)
    magnitude = x.double().abs() @ matrix.abs().T + (0 if bias is None else offset.abs())
    assert ((actual - (rounded(x) @ matrix.T + offset)).abs() <= 2e-6 * magnitude + 1e-30).all()
    step = (grouped(x.double()).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 64).flatten(1)[:, : x.shape[1]]
    error = (actual - (x.double() @ matrix.T + offset)).abs()
    assert (error <= step / 2 @ matrix.abs().T * 1.001 + 2e-6 * magnitude + 1e-30).all()
    return error


@every_shape
@both_bits
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_rounded_activations(cpu, random, bits, rows, out, size, biased):
    bias = random(out) if biased else None
    check(cpu, cpu.quantize(random(out, size), bits), without_ties(random(rows, size) * 3), bias)


@both_bits
def test_rounding_activations_costs_less_than_one_per_cent(cpu, random, bits):
    weight, x = cpu.quantize(random(300, 1024), bits), random(40, 1024)
    product = x.double() @ dequantize(weight, torch.float64).T
    assert (cpu.quant_linear(x, cpu.prepare(weight), None) - product).norm() < 0.008 * product.norm()


@every_shape
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_multiplies_what_the_codes_stand_for(random, dtype, bits, rows, out, size):
    ops = TorchOps()
    weight, x, bias = ops.quantize(random(out, size), bits), random(rows, size, dtype=dtype), random(out, dtype=dtype)
    actual = ops.quant_linear(x, ops.prepare(weight), bias)
    assert actual.dtype == dtype
    expected = x.double() @ dequantize(weight, torch.float64).T + bias.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype] * math.sqrt(size)
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


def test_torch_over_more_than_one_block(random):
    ops = TorchOps()
    weight, x = ops.quantize(random(5000, 1024), 4), random(2, 1024)
    expected = x.double() @ dequantize(weight, torch.float64).T
    torch.testing.assert_close(ops.quant_linear(x, ops.prepare(weight), None).double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    rows=st.integers(0, 80), out=st.integers(1, 100), size=st.integers(1, 300), bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(variant, rows, out, size, bits, seed):
    ops, generator = cpu_ops(variant), torch.Generator().manual_seed(seed)
    weight, x, bias = (torch.randn(*shape, generator=generator) for shape in ((out, size), (rows, size), (out,)))
    check(ops, ops.quantize(weight, bits), without_ties(x), bias)


@both_bits
@pytest.mark.parametrize("size", [2, 96, 256])
def test_official_checkpoints(cpu, random, bits, size):
    codes = (random(37, size * bits // 8) * 100).clamp(-128, 127).to(torch.int8)
    codes[0] = -128  # has no positive counterpart
    scales = random(37).abs().half()
    scales[3] = 0  # a row of zeros, whose codes mean nothing
    check(cpu, from_official(codes, scales, size), without_ties(random(9, size)), random(37))


def test_other_groups_are_torchs(cpu, random):
    codes = (random(5, 96) * 40).clamp(-127, 127).to(torch.int8)
    weight = QuantWeight(codes, random(5, 2), 8, 48, 96, None)
    x = random(4, 96)
    expected = TorchOps().quant_linear(x, weight, None)
    assert torch.equal(cpu.quant_linear(x, cpu.prepare(weight), None), expected)


@both_bits
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_a_row_stay_visible_in_it(cpu, random, bits, bad):
    weight, x = cpu.prepare(cpu.quantize(random(40, 130), bits)), random(11, 130)
    good = cpu.quant_linear(x, weight, None)
    x[6, 129] = bad
    actual = cpu.quant_linear(x, weight, None)
    assert not actual[6].isfinite().any()
    others = [*range(6), *range(7, 11)]
    assert torch.equal(actual[others], good[others])


@both_bits
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(cpu, random, bits, size):
    weight, x = cpu.quantize(random(20, 100), bits), random(3, 100)
    y = cpu.quant_linear(x * size, cpu.prepare(weight), None)
    product = x @ dequantize(weight, torch.float32).T
    if size < 1e-35:
        assert (y.abs() < 1e-33).all()
    else:
        assert (y / size - product).norm() < 0.02 * product.norm()


@both_bits
def test_a_row_does_not_depend_on_the_others(cpu, random, bits):
    weight, x = cpu.prepare(cpu.quantize(random(50, 200), bits)), random(79, 200)
    together = cpu.quant_linear(x, weight, None)
    for row in (0, 7, 8, 63, 64, 71, 76, 78):
        alone = cpu.quant_linear(x[row : row + 1], weight, None)[0]
        torch.testing.assert_close(alone, together[row], atol=2e-5, rtol=1e-6)  # compilers order sums as they like


def test_other_dtypes_and_parts_of_tensors(cpu, random):
    weight = cpu.prepare(cpu.quantize(random(50, 200), 4))
    x, bias = random(5, 400)[:, ::2], random(100)[::2]
    expected = cpu.quant_linear(x.contiguous(), weight, bias.contiguous())
    assert torch.equal(cpu.quant_linear(x, weight, bias), expected)
    halves = cpu.quant_linear(x.bfloat16(), weight, bias.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, atol=0.3, rtol=0.05)


def test_wrong_shapes_are_refused(cpu, random):
    weight = cpu.prepare(cpu.quantize(random(50, 200), 4))
    for x, bias in ((random(5, 199), None), (random(5, 200), random(49))):
        with pytest.raises(ValueError, match="50 x 200"):
            cpu.quant_linear(x, weight, bias)


def test_any_number_of_threads_and_callers(random):
    """The result is the same bit for bit; a caller who finds the threads busy works alone."""
    x = random(20, 300)
    ops = cpu_ops("plain", threads=1)
    weight = ops.prepare(ops.quantize(random(700, 300), 4))
    expected = ops.quant_linear(x, weight, None)
    wrong = []

    def call(ops):
        wrong.extend(1 for _ in range(30) if not torch.equal(ops.quant_linear(x, weight, None), expected))

    for count in (3, 2, 5, 1, 4, 2):
        ops = cpu_ops("plain", threads=count)
        assert ops.threads == count
        callers = [threading.Thread(target=call, args=[ops]) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong

"""Weights to codes in C against kernels/quantize.py; codes to tiles against plain Python that follows cpu/tiles.h."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels import quantize
from server.kernels.build import VARIANTS
from server.kernels.ops import QuantWeight
from server.kernels.torch_ops import dequantize
from server.quant.formats import from_official
from tests.kernels.conftest import cpu_ops

SHAPES = [(1500, 70), (1, 1), (17, 33), (3, 64), (40, 130), (288, 256), (0, 64), (2, 1713)]
OFFICIAL_TABLE = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.int8)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int4_in_c_is_as_in_python(cpu, random, rows, columns):
    weight = random(rows, columns)
    ours, theirs = cpu.quantize(weight, 4), quantize.quantize(weight, 4)
    assert ours.codes.shape == theirs.codes.shape and ours.codes.dtype == torch.int8
    assert ours.scales.shape == theirs.scales.shape and ours.scales.dtype == torch.float32
    assert torch.equal(ours.table, theirs.table) and (ours.in_features, ours.group_size) == (columns, 64)
    # sums in another order may prefer another scale to one that is as good, so errors are compared, row by row
    errors = [(dequantize(q, torch.float32) - weight).norm(dim=1) for q in (ours, theirs)]
    assert (errors[0] <= errors[1] * 1.05 + 1e-6).all() and (errors[1] <= errors[0] * 1.05 + 1e-6).all()
    assert rows == 0 or (ours.scales - theirs.scales).abs().median() <= 1e-6 * theirs.scales.abs().max()


def test_int4_scales_are_multiples_of_the_rows_largest(cpu, random):
    scales = cpu.quantize(random(50, 1000), 4).scales
    multiples = scales / (scales.abs().amax(1, keepdim=True) / 127)
    torch.testing.assert_close(multiples, multiples.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_other_dtypes_and_parts_of_tensors(cpu, random, dtype, bits):
    weight = random(70, 40).to(dtype).T
    ours, same = cpu.quantize(weight, bits), cpu.quantize(weight.float().contiguous(), bits)
    assert torch.equal(ours.codes, same.codes) and torch.equal(ours.scales, same.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e4])
def test_weights_of_any_size(ops, random, bits, scale):
    weight = random(5, 200)
    back = dequantize(ops.quantize(weight * scale, bits), torch.float32)
    if bits == 8 and scale < 1e-6:
        assert torch.equal(back, torch.zeros(5, 200))  # what float16 cannot hold as a scale
    else:
        assert (back / scale - weight).norm() < 0.1 * weight.norm()


def test_int4_weights_near_float32s_limits(ops, random):
    weight = random(4, 128).sign() * 3e38
    assert (dequantize(ops.quantize(weight, 4), torch.float32) / weight - 1).abs().max() < 0.2
    assert torch.equal(dequantize(ops.quantize(weight * 1e-75, 4), torch.float32), torch.zeros(4, 128))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_among_weights_stay_visible(ops, random, bits, bad):
    weight = random(20, 128)
    weight[7, 100] = bad
    quantized = ops.quantize(weight, bits)
    back = dequantize(quantized, torch.float32)
    assert back[7, 96:].isnan().all() and back[[*range(7), *range(8, 20)]].isfinite().all()
    y = ops.quant_linear(random(3, 128), ops.prepare(quantized), None)
    assert y[:, 7].isnan().all() and y[:, [*range(7), *range(8, 20)]].isfinite().all()


def nibble(row, column):
    """The code of a column in a row of packed bytes."""
    byte = row[column // 2] & 255
    return byte & 15 if column % 2 else byte >> 4


def tiles_in_python(weight: QuantWeight) -> list[int]:
    """The bytes of cpu/tiles.h, one by one."""
    groups, rows = -(-weight.in_features // 64), weight.codes.tolist()
    code = {4: nibble, 8: lambda row, column: row[column] & 255}[weight.bits]

    def at(row, column):
        inside = row < len(rows) and column < len(rows[row]) * 8 // weight.bits
        return code(rows[row], column) if inside else 0

    out = []
    for tile in range(-(-len(rows) // 16)):
        for group in range(groups):
            for quad in range(16 * weight.bits // 8):
                for row in range(16 * tile, 16 * tile + 16):
                    for column in range(64 * group + 4 * quad, 64 * group + 4 * quad + 4):
                        high = at(row, column + 32) << 4 if weight.bits == 4 else 0
                        out.append(at(row, column) | high)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    rows=st.integers(0, 40), columns=st.integers(1, 150), bits=st.sampled_from([4, 8]),
    official=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_tiles(variant, rows, columns, bits, official, seed):
    ops, generator = cpu_ops(variant), torch.Generator().manual_seed(seed)
    columns += official and columns % 2  # official int4 matrices have an even width
    if official:
        codes = torch.randint(-128, 128, (rows, columns * bits // 8), generator=generator, dtype=torch.int8)
        weight = from_official(codes, torch.rand(rows, generator=generator), columns)
    else:
        weight = ops.quantize(torch.randn(rows, columns, generator=generator), bits)
    tiled = ops.prepare(weight)
    assert tiled.codes.tolist() == tiles_in_python(weight)
    scales = tiled.scales.float().view(-1, tiled.scales.shape[1], 16).transpose(1, 2).flatten(0, 1)
    if bits == 4:
        scales = scales * tiled.row_scales.unsqueeze(1)
    assert scales.shape[1] == -(-columns // 64) * (1 if bits == 4 else 2)
    expected = (weight.scales.expand(-1, scales.shape[1]) if official else weight.scales).float()
    there = scales[:rows, : expected.shape[1]]
    torch.testing.assert_close(there, expected, rtol=1e-3 if bits == 8 else 1e-6, atol=1e-7)
    assert not scales[rows:].any()

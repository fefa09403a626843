"""Packing and rounding: what is stored is what is meant, and no worse than llama.cpp's formats of the same size."""

import pytest
import torch

from server.kernels.torch_ops import TorchOps, dequantize
from server.quant.formats import from_official, pack_int4, quantize
from server.quant.linear import QuantEmbedding, QuantLinear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def q4_0(weight):
    """llama.cpp's Q4_0 (quantize_row_q4_0_ref): scale = value of largest magnitude / -8, codes rounded half up."""
    groups = weight.view(weight.shape[0], -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (groups / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15) - 8
    return (codes * scale.half().float()).view_as(weight)


def heavy_tailed(rows, columns):
    return random(rows, columns) * random(rows, columns, seed=9).exp()


@pytest.mark.parametrize("weight", [random(64, 512), heavy_tailed(64, 512)], ids=["normal", "heavy tails"])
def test_int4_is_no_worse_than_q4_0(weight):
    x = random(16, 512, seed=3)
    ours = dequantize(quantize(weight, 4), torch.float32)
    theirs = q4_0(weight)
    assert (ours - weight).norm() < (theirs - weight).norm()
    by_group = [(w - weight).view(-1, 32).square().sum(1) for w in (ours, theirs)]
    # the scale's own rounding to float16 may cost a hair
    assert (by_group[0] <= by_group[1] * 1.01 + 1e-9).all()
    product = x @ weight.T
    assert (x @ ours.T - product).norm() <= (x @ theirs.T - product).norm() * 1.01


def test_relative_error_of_products():
    weight, x = random(256, 4096), random(8, 4096, seed=1)
    product = x @ weight.T
    for bits, allowed in ((4, 0.095), (8, 0.006)):
        ours = x @ dequantize(quantize(weight, bits), torch.float32).T
        assert (ours - product).norm() / product.norm() < allowed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 32), (3, 33, 32), (5, 31, 32), (700, 1024, 64), (2, 64, 64)]
)
def test_shapes_and_padding(bits, rows, columns, group):
    weight = random(rows, columns)
    quantized = quantize(weight, bits, group)
    groups = -(-columns // group)
    assert quantized.codes.shape == (rows, groups * group * bits // 8)
    assert quantized.codes.dtype == torch.int8
    assert quantized.scales.shape == (rows, groups) and quantized.scales.dtype == torch.float16
    assert quantized.out_features == rows
    back = dequantize(quantized, torch.float32)
    assert back.shape == weight.shape
    assert (back - weight).abs().max() <= weight.abs().max() / (7 if bits == 4 else 127)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_tiny_values(bits):
    weight = torch.zeros(2, 64)
    weight[1] = 1e-12
    weight[1, 40] = 5.0
    back = dequantize(quantize(weight, bits), torch.float32)
    assert torch.equal(back[0], torch.zeros(64))
    assert back.isfinite().all() and back[1, 40] == pytest.approx(5.0, rel=0.01)


def test_half_precision_input():
    weight = random(8, 64).half()
    assert torch.equal(quantize(weight, 4).codes, quantize(weight.float(), 4).codes)


def test_packing_of_int4():
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.view(torch.uint8).tolist() == [[0x87, 0x0F]]
    weight = from_official(packed, torch.tensor([2.0]), 4)
    assert dequantize(weight, torch.float32).tolist() == [[-16.0, 14.0, 0.0, -2.0]]


def test_official_int8():
    codes = torch.tensor([[-127, 3, 5], [0, 0, 99]], dtype=torch.int8)
    weight = from_official(codes, torch.tensor([0.5, 0.0]), 3)
    assert weight.bits == 8
    assert dequantize(weight, torch.float32).tolist() == [[-63.5, 1.5, 2.5], [0.0, 0.0, 0.0]]


def test_official_scales_keep_their_precision():
    codes = torch.tensor([[1, -7, 3, 0]], dtype=torch.int8)
    for scale in (torch.tensor([1.0001]), torch.tensor([1e-6], dtype=torch.bfloat16)):
        assert torch.equal(dequantize(from_official(codes, scale, 4), torch.float32), codes * scale.float())


def test_quant_linear_takes_the_place_of_linear():
    linear = torch.nn.Linear(40, 6)
    bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    layer = QuantLinear(quantize(linear.weight.detach(), 8), bias, TorchOps())
    x = random(3, 40)
    torch.testing.assert_close(layer(x), linear(x).detach(), atol=0.02, rtol=0)
    assert dict(layer.named_parameters()).keys() == {"bias"}
    assert repr(layer) == "QuantLinear(40, 6, bits=8, bias=True)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embedding_gives_the_matrixs_rows(bits, dtype):
    weight = quantize(random(50, 40), bits)  # 40 values: the last group of each row is filled up
    embedding = QuantEmbedding(weight, dtype)
    ids = torch.tensor([49, 0, 7, 7])
    assert torch.equal(embedding(ids), dequantize(weight, dtype)[ids])

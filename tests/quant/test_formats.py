"""Packing and rounding: what is stored is what is meant, and no worse than llama.cpp's formats of the same size."""

import pytest
import torch

from benchmarks.formats import q4_0, q8_0
from server.kernels.ops import QuantWeight
from server.kernels.quantize import INT4_TABLE, pack_int4, quantize
from server.kernels.torch_ops import TorchOps, dequantize
from server.quant.formats import from_official
from server.quant.linear import QuantEmbedding, QuantLinear


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows, columns):
    return random(rows, columns) * random(rows, columns, seed=9).exp()


def bits_per_weight(quantized: QuantWeight) -> float:
    """As the C kernels hold them: 4 bits with scales of 8 bits and one of 32 for each row, 8 bits with scales of 16."""
    rows, groups = quantized.scales.shape
    values = rows * quantized.in_features
    scales = rows * (groups * 8 + 32) if quantized.bits == 4 else rows * groups * 16
    return (quantized.codes.numel() * 8 + scales) / values


@pytest.mark.parametrize("weight", [random(128, 4096), heavy_tailed(128, 4096)], ids=["normal", "heavy tails"])
@pytest.mark.parametrize(("bits", "peer", "peer_bits"), [(4, q4_0, 4.5), (8, q8_0, 8.5)], ids=["Q4_0", "Q8_0"])
def test_no_worse_than_llama_cpp_at_no_more_bits(weight, bits, peer, peer_bits):
    quantized = quantize(weight, bits)
    assert bits_per_weight(quantized) <= (4.14 if bits == 4 else peer_bits)
    x = random(64, 4096, seed=3)
    ours, theirs, product = dequantize(quantized, torch.float32), peer(weight), x @ weight.T
    assert (ours - weight).norm() <= (theirs - weight).norm() * (1 if bits == 4 else 1.0001)  # the same rule
    assert (x @ ours.T - product).norm() <= (x @ theirs.T - product).norm() * 1.005  # which has luck in it


def test_relative_error_of_products():
    weight, x = random(256, 4096), random(8, 4096, seed=1)
    product = x @ weight.T
    for bits, allowed in ((4, 0.083), (8, 0.0056)):
        ours = x @ dequantize(quantize(weight, bits), torch.float32).T
        assert (ours - product).norm() / product.norm() < allowed


def test_the_table_is_where_lloyds_algorithm_stands_still():
    """Each value is the mean of the weights that it stands for, each in units of its group's scale."""
    assert INT4_TABLE.tolist() == sorted(set(INT4_TABLE.tolist())) and len(INT4_TABLE) == 16
    weight = random(500, 4096)
    quantized = quantize(weight, 4)
    scales = quantized.scales.repeat_interleave(64, dim=1)
    places = torch.stack([(quantized.codes >> 4) & 15, quantized.codes & 15], dim=-1).flatten(1).long()
    # a weight's squared error counts by its scale's square
    count = torch.zeros(16).index_add_(0, places.flatten(), scales.square().flatten())
    total = torch.zeros(16).index_add_(0, places.flatten(), (weight * scales).flatten())
    assert (total / count - INT4_TABLE).abs().max() < 2


def test_every_value_gets_the_nearest_code():
    quantized = quantize(heavy_tailed(50, 300), 4)
    back, scales = dequantize(quantized, torch.float64), quantized.scales.repeat_interleave(64, dim=1)[:, :300]
    error = (back - heavy_tailed(50, 300)).abs()
    least = (scales.double().unsqueeze(-1) * INT4_TABLE - heavy_tailed(50, 300).unsqueeze(-1)).abs().amin(-1)
    assert (error <= least + 1e-5).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (5, 31), (700, 1024), (2, 64), (0, 7)])
def test_shapes_and_padding(bits, rows, columns):
    weight = random(rows, columns)
    quantized = quantize(weight, bits)
    group = 64 if bits == 4 else 32
    groups = -(-columns // group)
    assert quantized.group_size == group and quantized.in_features == columns
    assert quantized.codes.shape == (rows, groups * group * bits // 8)
    assert quantized.codes.dtype == torch.int8
    assert quantized.scales.shape == (rows, groups)
    assert quantized.scales.dtype == (torch.float32 if bits == 4 else torch.float16)
    assert (quantized.table is None) is (bits == 8)
    assert quantized.out_features == rows
    back = dequantize(quantized, torch.float32)
    assert back.shape == weight.shape
    if rows:
        assert (back - weight).abs().max() <= weight.abs().max() * (0.3 if bits == 4 else 0.0045)


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
    layer = QuantLinear(TorchOps().prepare(quantize(linear.weight.detach(), 8)), bias, TorchOps())
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

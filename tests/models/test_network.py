"""The network's configuration and its half precision; its float32 results are checked in test_oracle."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.kv_cache import KVCache
from server.errors import ModelError
from server.kernels.torch_ops import TorchOps
from server.models.base import Context, ForwardBatch, Segment
from server.models.chatglm.prompt import ChatGLM
from server.models.chatglm2.model import Rotary
from server.models.chatglm2.prompt import ChatGLM2, ChatGLM3
from server.models.families import find_family
from server.models.files import read_json
from server.models.loader import load_network
from tests.models.reference import OWN
from tests.oracle import ORACLE, oracle_file

CONFIG = read_json(OWN / "tiny-chatglm2" / "config.json")
NEEDED = [
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "ffn_hidden_size",
    "padded_vocab_size",
    "seq_length",
    "layernorm_epsilon",
    "add_qkv_bias",
    "multi_query_attention",
    "rmsnorm",
    "post_layer_norm",
    "add_bias_linear",
    "apply_residual_connection_post_layernorm",
]


@pytest.mark.parametrize("field", NEEDED)
def test_missing_field_is_named(field):
    config = {k: v for k, v in CONFIG.items() if k != field}
    with pytest.raises(ModelError, match=field) as caught:
        ChatGLM2().build_network(config, TorchOps())
    assert field in caught.value.zh


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multi_query_attention", False),
        ("add_bias_linear", True),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("apply_residual_connection_post_layernorm", True),
        ("multi_query_group_num", 4),
        ("multi_query_group_num", 0),
        ("kv_channels", 6),
        ("num_layers", "28"),
        ("num_layers", 28.0),
        ("hidden_size", -1),
        ("add_qkv_bias", 1),
        ("layernorm_epsilon", None),
        ("rope_ratio", 0),
    ],
)
def test_impossible_value_is_named(field, value):
    with pytest.raises(ModelError, match=field) as caught:
        ChatGLM2().build_network({**CONFIG, field: value}, TorchOps())
    assert repr(value) in caught.value.en and repr(value) in caught.value.zh
    wanted = caught.value.zh.partition("应为")[2].partition("；")[0]
    assert not set(re.findall("[A-Za-z_]+", wanted)) - {"true", "false", "num_attention_heads"}


def test_official_configurations_are_accepted():
    for name in ("chatglm2-6b-32k", "chatglm2-6b-first-release", "chatglm2-6b-int4", "chatglm3-6b", "codegeex2-6b"):
        config = read_json(oracle_file("configs", f"{name}.json"))
        network = find_family(config, OWN / name).build_network(config, TorchOps())
        assert network.kv_shape == (28, 2, 128)
        assert network.vocab_size == 65024
        assert network.max_positions == config["seq_length"]
        # 6.24 G parameters, none of them in memory
        assert sum(p.numel() for p in network.parameters()) * 2 == pytest.approx(12_487_168_064, rel=1e-6)


ROTARY = {
    "chatglm2": {},
    "chatglm3": {},
    "chatglm2_32k_ratio16": {"divisor": 16.0},
    "chatglm3_32k_ratio50_UNOFFICIAL": {"base": 500000.0},
}


@pytest.mark.parametrize("model", ROTARY)
def test_rotary_table_as_official_in_float32(model):
    ops = load_file(oracle_file("ops", "ops.safetensors"))
    cos, sin = Rotary(64, **ROTARY[model]).cos_sin(ops["positions"]).unbind(-1)
    torch.testing.assert_close(cos, ops[f"{model}.fp32.cos"], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, ops[f"{model}.fp32.sin"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 0.08), (torch.bfloat16, 0.6)])
@torch.inference_mode()
def test_half_precision_stays_near_float32(dtype, allowed):
    logits = []
    for kind in (torch.float32, dtype):
        network, _ = load_network(OWN / "tiny-chatglm2", CONFIG, ChatGLM2(), dtype=kind, device="cpu", ops=TorchOps())
        cache = KVCache(network.kv_shape, 1, 64, kind, "cpu")
        ids = torch.arange(3, 43)
        logits.append(network.forward(ForwardBatch(ids, [Segment(0, 0, 40)], torch.arange(40)), cache))
        assert logits[-1].dtype == torch.float32
    assert (logits[0] - logits[1]).abs().max() < allowed * logits[0].std()


@torch.inference_mode()
def test_only_the_wanted_rows_and_none_at_all():
    folder = OWN / "tiny-chatglm3-32k"
    config = read_json(folder / "config.json")
    network, _ = load_network(folder, config, ChatGLM3(), dtype=torch.float32, device="cpu", ops=TorchOps())
    cache = KVCache(network.kv_shape, 2, 16, torch.float32, "cpu")
    ids, segments = torch.arange(3, 12), [Segment(1, 0, 4), Segment(0, 0, 5)]
    everything = network.forward(ForwardBatch(ids, segments, torch.arange(9)), cache)
    some = network.forward(ForwardBatch(ids, segments, torch.tensor([3, 8])), cache)
    torch.testing.assert_close(some, everything[[3, 8]])
    assert network.forward(ForwardBatch(ids, segments, torch.empty(0, dtype=torch.int64)), cache).shape == (0, 64)


@torch.inference_mode()
def test_positions_beyond_the_trained_length_are_computed():
    folder = OWN / "tiny-chatglm2"
    network, _ = load_network(folder, CONFIG, ChatGLM2(), dtype=torch.float32, device="cpu", ops=TorchOps())
    cache = KVCache(network.kv_shape, 1, 300, torch.float32, "cpu")
    length = network.max_positions + 20
    batch = ForwardBatch(torch.arange(length) % 60 + 3, [Segment(0, 0, length)], torch.tensor([length - 1]))
    assert network.forward(batch, cache).isfinite().all()


@pytest.mark.skipif(not (ORACLE / "chatglmcpp").exists(), reason="no reference data")
@pytest.mark.parametrize(
    ("name", "family", "head", "context"),
    [
        ("glm2", ChatGLM2(), "transformer.output_layer", None),
        ("glm", ChatGLM(), "lm_head", Context(length=2, mask=1)),
    ],
)
@torch.inference_mode()
def test_hidden_states_of_chatglm_cpp(tmp_path, name, family, head, context):
    """Hidden states that chatglm.cpp's authors published; their files have no output layer."""
    folder = ORACLE / "chatglmcpp" / name
    config, vectors = read_json(folder / "config.json"), load_file(folder / "vectors.safetensors")
    weights = load_file(folder / "model.safetensors")
    weights[head + ".weight"] = torch.zeros(5, config["hidden_size"])
    save_file(weights, tmp_path / "model.safetensors")
    network, _ = load_network(tmp_path, config, family, dtype=torch.float32, device="cpu", ops=TorchOps())
    network.set_submodule(head, torch.nn.Identity())
    cache, start = KVCache(network.kv_shape, 1, 8, torch.float32, "cpu"), 0
    for i in (1, 2, 3):
        ids = vectors[f"x{i}"].long()
        segment = Segment(0, start, len(ids), context)
        hidden = network.forward(ForwardBatch(ids, [segment], torch.arange(len(ids))), cache)
        torch.testing.assert_close(hidden, vectors[f"y{i}"], atol=1e-5, rtol=0)
        start += len(ids)

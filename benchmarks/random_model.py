"""Makes a full-size checkpoint of random weights: it says nothing sensible, but it costs what the real one costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent

# the released config.json's fields that matter (chatglm2-6b, August 2023)
CONFIGS = {
    "chatglm2-6b": {
        "model_type": "chatglm",
        "num_layers": 28,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "ffn_hidden_size": 13696,
        "padded_vocab_size": 65024,
        "seq_length": 32768,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Official tensor names and shapes of a ChatGLM2 checkpoint."""
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads = config["num_attention_heads"] * config["kv_channels"]
    qkv = heads + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attention.query_key_value.weight": (qkv, hidden),
            layer + "self_attention.query_key_value.bias": (qkv,),
            layer + "self_attention.dense.weight": (hidden, heads),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            layer + "mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    return shapes | {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }


def make_random_model(name: str, folder: Path, layers: int | None = None, shard_bytes: int = 2 * 10**9) -> None:
    """Write ``name``'s architecture with random float16 weights into ``folder``, in shards with an index.

    Does nothing where the folder is complete. The tokenizer is the demo model's: its ids all exist in the large
    vocabulary, and speed does not depend on what a token means.
    """
    if (folder / "model.safetensors.index.json").exists():
        return
    config = dict(CONFIGS[name])
    if layers:
        config["num_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(ROOT / "THUDM" / "demo" / "tokenizer.model", folder)
    generator = torch.Generator().manual_seed(0)
    weight_map, shard, size = {}, {}, 0
    for tensor_name, shape in tensor_shapes(config).items():
        is_norm = "layernorm" in tensor_name
        tensor = torch.ones(shape) if is_norm else torch.randn(shape, generator=generator) * 0.02
        shard[tensor_name] = tensor.half()
        size += shard[tensor_name].nbytes
        if size >= shard_bytes:
            shard, size = _write_shard(folder, shard, weight_map), 0
    if shard:
        _write_shard(folder, shard, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> dict:
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, folder / file)
    weight_map.update(dict.fromkeys(shard, file))
    print(f"  {folder / file}")
    return {}

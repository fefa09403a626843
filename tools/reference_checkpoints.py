"""The configurations and random weights of the tiny reference checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.plain_networks import plain_network

BLOCK = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 36,
    "padded_vocab_size": 64,
    "seq_length": 256,
}
# of the official configurations also what this program does not read
OFFICIAL = {
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "use_cache": True,
    "padded_vocab_size": 464,
}
# three layers: the residual scale must not follow their number
FIRST = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "hidden_size": 32,
    "inner_hidden_size": 72,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 512,
    "num_attention_heads": 4,
    "num_layers": 3,
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 480,
}
LIKE_2 = {**OFFICIAL, "_name_or_path": "THUDM/chatglm2-6b", "seq_length": 1024}
LIKE_3 = {**OFFICIAL, "_name_or_path": "THUDM/chatglm3-6b", "seq_length": 512, "num_attention_heads": 4}
CODE = {
    **OFFICIAL,
    "_name_or_path": "THUDM/codegeex2-6b",
    "torch_dtype": "bfloat16",
    "interleaved_qkv": False,
    "rotary_percent": 0.5,
    "seq_length": 512,
    "kv_channels": 12,
    "num_attention_heads": 2,
}
PREFIX = {"pre_seq_len": 5, "prefix_projection": False}
PROJECTED = {"pre_seq_len": 4, "prefix_projection": True}


@dataclass(frozen=True)
class Spec:
    """One folder of tests/data/reference. ``base``: the folder beside which its tensors stand, and which it needs."""

    family: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    layout: str = "safetensors"  # or "shards": pytorch_model-0000x-of-00002.bin and an index
    lora: int = 0  # the rank of a LoRA adapter, which is all that the folder holds then

    @property
    def bits(self) -> int:
        return self.changes.get("quantization_bit", 16)


# tiny-*: no vocabulary, ids only. small-*: with tests/data/tokenizers beside the weights they are complete folders
SPECS = {
    "tiny-chatglm2": Spec("chatglm2", 1),
    "tiny-chatglm2-32k": Spec("chatglm2", 2, {"rope_ratio": 16, "num_attention_heads": 4, "ffn_hidden_size": 40}),
    "tiny-chatglm3-32k": Spec("chatglm3", 3, {"rope_ratio": 50, "multi_query_group_num": 1, "num_attention_heads": 3}),
    "small-chatglm2": Spec("chatglm2", 10, LIKE_2),
    "small-chatglm2-int4": Spec("chatglm2", 11, {**LIKE_2, "quantization_bit": 4}),
    "small-chatglm2-ptuning": Spec("chatglm2", 12, {**LIKE_2, **PREFIX}, base="small-chatglm2"),
    "small-chatglm2-lora": Spec("chatglm2", 13, LIKE_2, base="small-chatglm2", lora=3),
    "small-chatglm3": Spec("chatglm3", 20, LIKE_3, layout="shards"),
    "small-chatglm3-ptuning": Spec("chatglm3", 21, {**LIKE_3, **PROJECTED}, base="small-chatglm3"),
    "small-chatglm3-with-ptuning": Spec("chatglm3", 22, {**LIKE_3, **PREFIX}),
    "small-codegeex2": Spec("codegeex2", 30, CODE),
    "small-chatglm": Spec("chatglm", 40),
    "small-chatglm-int8": Spec("chatglm", 41, {"quantization_bit": 8, "quantization_embeddings": False}),
    "small-chatglm-int4": Spec("chatglm", 42, {"quantization_bit": 4, "quantization_embeddings": False}),
    "small-chatglm-int4-qe": Spec("chatglm", 43, {"quantization_bit": 4, "quantization_embeddings": True}),
    "small-chatglm-ptuning": Spec("chatglm", 44, PROJECTED, base="small-chatglm"),
}


def make_config(spec: Spec, special: Mapping[str, int]) -> dict[str, Any]:
    """config.json; ``special``: the ids that ChatGLM-6B's names, of its tokenizer."""
    if spec.family != "chatglm":
        config = {**BLOCK, **spec.changes}
        if spec.family == "codegeex2":
            del config["pad_token_id"]  # as in the official one
        return config
    edition = "chatglm-6b" + {16: "", 8: "-int8", 4: "-int4"}[spec.bits]
    return {"_name_or_path": f"THUDM/{edition}", **special, **FIRST, **spec.changes}


def make_weights(config: Mapping[str, Any], family: str, seed: int) -> dict[str, Tensor]:
    """Random tensors under the official names in the official dtype, large enough for attention to be uneven."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    weights = {}
    for name, empty in plain_network(config, family).state_dict().items():
        if name == "lm_head.weight":
            weights[name] = weights["transformer.word_embeddings.weight"].clone()
            continue
        values = torch.randn(empty.shape, generator=generator)
        # a P-tuning prefix stays in float32 beside a model in half precision
        weights[name] = _scaled(name, values, family).to(torch.float32 if "prefix_encoder" in name else dtype)
    return weights


def _scaled(name: str, values: Tensor, family: str) -> Tensor:
    if "prefix_encoder.embedding" in name:
        return values
    if values.ndim == 1:
        if "prefix_encoder" in name or (family == "chatglm" and name.endswith("bias")):
            return 0.1 * values
        return 1 + 0.3 * values
    # beside ChatGLM-6B's residuals, which are multiplied by 7.5, attention must matter as well
    louder = 8 if family == "chatglm" and name.endswith("attention.dense.weight") else 1
    return values * (2 * louder / values.shape[-1] ** 0.5)


def quieten(weights: dict[str, Tensor], rows: list[int], factor: float) -> None:
    """Make the ids ``rows`` less likely answers, as training does with those that stand for no text."""
    for name in ("transformer.word_embeddings.weight", "lm_head.weight", "transformer.output_layer.weight"):
        if name in weights:
            weights[name][rows] *= factor


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, whatever files they are in; an adapter's have other names."""
    loaded = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
    loaded += [torch.load(path, weights_only=True) for path in sorted(folder.glob("pytorch_model*.bin"))]
    return {name: tensor for tensors in loaded for name, tensor in tensors.items()}

"""Checkpoints of random weights from the independent networks in tools/, and what ours make of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from server.engine.kv_cache import KVCache
from server.kernels.torch_ops import TorchOps
from server.models.base import ForwardBatch, Segment
from server.models.families import find_family
from server.models.loader import load_network
from tools.plain_networks import plain_network

_GLM2 = {
    "num_layers": 3, "hidden_size": 40, "num_attention_heads": 6, "multi_query_group_num": 3, "kv_channels": 8,
    "ffn_hidden_size": 56, "padded_vocab_size": 90, "seq_length": 256, "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True, "multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True,
    "add_bias_linear": False, "apply_residual_connection_post_layernorm": False, "model_type": "chatglm",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm": {
        "num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "inner_hidden_size": 72, "vocab_size": 90,
        "max_sequence_length": 128, "layernorm_epsilon": 1e-5, "position_encoding_2d": True, "bos_token_id": 84,
        "eos_token_id": 85, "mask_token_id": 80, "gmask_token_id": 81, "pad_token_id": 3, "model_type": "chatglm",
    },
    "chatglm2": _GLM2,
    "chatglm3": {**_GLM2, "rope_ratio": 50},
    "codegeex2": {**_GLM2, "torch_dtype": "bfloat16", "rotary_percent": 0.5, "interleaved_qkv": False},
}  # fmt: skip
PROMPTS = {"chatglm": [7, 20, 3, 51, 12, 81, 84], "chatglm2": [64, 70, 7, 20, 3, 51, 12]}
TOLERANCE = {"chatglm": 2e-4}  # others: 1e-4
EMBEDDING = {"chatglm": "transformer.word_embeddings.weight"}


class Loaded(NamedTuple):
    network: nn.Module
    prefix: tuple[torch.Tensor, torch.Tensor] | None


def prompt(family: str) -> list[int]:
    return PROMPTS.get(family, PROMPTS["chatglm2"])


def tolerance(family: str) -> float:
    return TOLERANCE.get(family, 1e-4)


def random_network(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Weights that give logits of about 3, biases and norms not at their starting values."""
    torch.manual_seed(seed)
    network = plain_network({**CONFIGS[family], **changes}, family)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "prefix_encoder" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.7)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    return network.eval()


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load_ours(folder: Path, family: str, **options: Any) -> Loaded:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {"dtype": torch.float32, **options}
    return Loaded(
        *load_network(folder, config, find_family(config, folder, family), device="cpu", ops=TorchOps(), **options)
    )


@torch.inference_mode()
def our_logits(loaded: Loaded, ids: list[int], *, prompt_length: int | None = None) -> torch.Tensor:
    """Logits [len(ids), vocab]; what follows the prompt is fed token by token, as when answering."""
    length = prompt_length or len(ids)
    context = loaded.network.context(ids[:length])
    cache = KVCache(loaded.network.kv_shape, 2, len(ids), torch.float32, "cpu", loaded.prefix)
    steps = [(0, length), *((i, 1) for i in range(length, len(ids)))]
    rows = []
    for start, count in steps:
        part = torch.tensor(ids[start : start + count])
        batch = ForwardBatch(part, [Segment(1, start, count, context)], torch.arange(count))
        rows.append(loaded.network.forward(batch, cache))
    return torch.cat(rows)


@torch.inference_mode()
def assert_same_answers(loaded: Loaded, judge: nn.Module, family: str, count: int = 12) -> None:
    """Logits of prompt and answer within the family's tolerance, and the same greedy tokens."""
    ids = list(prompt(family))
    for _ in range(count):
        ids.append(int(judge(torch.tensor(ids))[-1].argmax()))
    expected = judge(torch.tensor(ids))
    actual = our_logits(loaded, ids, prompt_length=len(prompt(family)))
    difference = float((actual - expected).abs().max())
    assert difference < tolerance(family), f"{family}: logits differ by {difference:.2e}"
    answers = range(len(prompt(family)) - 1, len(ids) - 1)
    assert [int(actual[i].argmax()) for i in answers] == ids[len(prompt(family)) :]
    assert expected.std() > 0.5  # else nothing would be told from nothing

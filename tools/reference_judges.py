"""Who says what the reference checkpoints should give: networks that share no code with server/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM
from transformers import __version__ as transformers_version

from tools.plain_networks import plain_network


class Judge(Protocol):
    """Float32 results of whole sequences, without a cache."""

    source: str

    def logits(self, ids: list[int]) -> Tensor:
        """[n, vocab]."""

    def cache(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Keys, after the rotary embedding, and values, [layers, n, groups, head_dim] each."""


class GlmJudge:
    """transformers' own GLM, for float checkpoints of the ChatGLM2 block without a P-tuning prefix."""

    source = f"transformers {transformers_version} GlmForCausalLM"

    def __init__(self, config: Mapping[str, Any], family: str, weights: Mapping[str, Tensor]):
        self._glm = build_glm(config, family, weights)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        return self._glm(torch.tensor([ids]), use_cache=False).logits[0]

    @torch.inference_mode()
    def cache(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        layers = self._glm(torch.tensor([ids]), use_cache=True).past_key_values.layers
        stacked = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
        keys, values = (tensor.transpose(1, 2).contiguous() for tensor in stacked)
        return keys, values


class PlainJudge:
    """tools/plain_networks.py, for everything; ``network`` may be wrapped, by peft for example."""

    source = "tools/plain_networks.py"

    def __init__(self, config: Mapping[str, Any], family: str, weights: Mapping[str, Tensor]):
        self.network = plain_network(config, family)
        self.network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        return self.network(torch.tensor(ids))

    @torch.inference_mode()
    def cache(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        self.network(torch.tensor(ids))
        return self.network.keys_values()


def add_lora(judge: PlainJudge, rank: int, generator: torch.Generator, folder: Path) -> None:
    """Give the judge's network a random LoRA adapter, and save that as peft does."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query_key_value", "dense_4h_to_h"])
    judge.network = peft.get_peft_model(judge.network, config)
    adapter = {name: part for name, part in judge.network.named_parameters() if ".lora_" in name}
    for part in adapter.values():
        part.data = torch.randn(part.shape, generator=generator) * (0.7 / part.shape[-1] ** 0.5)
    judge.network.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = folder / "adapter_config.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    content["target_modules"].sort()  # a set, in any order
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def greedy(judge: Judge, ids: list[int], count: int, stop: frozenset[int] = frozenset()) -> tuple[list[int], float]:
    """Greedy ids, up to and with one of ``stop``, and the smallest distance of best and second logit on the way."""
    answer, margin = [], float("inf")
    while len(answer) < count and not (answer and answer[-1] in stop):
        best = judge.logits(ids + answer)[-1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        answer.append(int(best.indices[0]))
    return answer, margin


def build_glm(config: Mapping[str, Any], family: str, weights: Mapping[str, Tensor]) -> GlmForCausalLM:
    """transformers' GLM in float32 with an official checkpoint's configuration and weights."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ratio = config.get("rope_ratio", 1)
    if family == "chatglm2" and ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(ratio)}
    elif ratio != 1:
        rope["rope_theta"] *= ratio
    glm = GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["ffn_hidden_size"],
            num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["multi_query_group_num"],
            head_dim=config["kv_channels"],
            rms_norm_eps=config["layernorm_epsilon"],
            attention_bias=config["add_qkv_bias"],
            max_position_embeddings=config["seq_length"],
            rope_parameters=rope,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=2,
        )
    )
    glm.load_state_dict(_glm_names(config, weights))
    return glm.float().eval()


def _glm_names(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups = config["multi_query_group_num"] * config["kv_channels"]
    parts = [config["num_attention_heads"] * config["kv_channels"], groups, groups]
    renamed = {
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.output_layer": "lm_head",
        "transformer.encoder.layers": "model.layers",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.gate_up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    result = {}
    for name, tensor in weights.items():
        if name.endswith("inv_freq"):
            continue
        for official, glm in renamed.items():
            name = name.replace(official, glm)
        if ".query_key_value." in name:
            for part, rows in zip("qkv", tensor.float().split(parts), strict=True):
                result[name.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
        else:
            result[name] = tensor.float()
    return result

"""How much memory a model takes, from the fields of its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ModelError

GiB = 2**30
# A quantized weight's bits with its share of the scale that its group has in common (kernels/quantize.py).
STORED_BITS = {4: 4.5, 8: 8.5}
# Held beside weights and cache: the CUDA context with its libraries, or the Python process with torch.
GPU_RUNTIME = int(0.6 * GiB)
CPU_RUNTIME = int(0.5 * GiB)


@dataclass(frozen=True)
class ModelShape:
    """What a model's memory depends on; counts are values, not bytes."""

    layers: int  # values in the layers' matrices
    output: int  # in the output matrix
    rest: int  # never quantized: embedding, norms, biases
    widest: int  # in the largest matrix of a layer
    ffn: int  # rows of the first MLP matrix
    heads: int
    kv: int  # that one token leaves in the cache
    seq_length: int  # positions that the model knows
    stored_bits: int = 16  # 4 or 8 if the checkpoint itself is quantized

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a config.json of any generation; raises KeyError for a field that is missing."""
        return cls._of_chatglm(config) if "inner_hidden_size" in config else cls._of_chatglm2(config)

    @classmethod
    def _of_chatglm(cls, config: Mapping[str, Any]) -> ModelShape:
        depth, hidden, ffn = config["num_layers"], config["hidden_size"], config["inner_hidden_size"]
        matrices = (3 * hidden * hidden, hidden * hidden, ffn * hidden, ffn * hidden)
        table = config["vocab_size"] * hidden
        return cls(
            layers=depth * sum(matrices),
            output=table,
            rest=table + depth * (9 * hidden + ffn) + 2 * hidden,
            widest=max(matrices),
            ffn=ffn,
            heads=config["num_attention_heads"],
            kv=2 * depth * hidden,
            seq_length=config["max_sequence_length"],
            stored_bits=config.get("quantization_bit") or 16,
        )

    @classmethod
    def _of_chatglm2(cls, config: Mapping[str, Any]) -> ModelShape:
        depth, hidden, ffn = config["num_layers"], config["hidden_size"], config["ffn_hidden_size"]
        heads, head_dim = config["num_attention_heads"], config["kv_channels"]
        groups = config.get("multi_query_group_num", 1) if config.get("multi_query_attention") else heads
        qkv = (heads + 2 * groups) * head_dim
        matrices = (qkv * hidden, heads * head_dim * hidden, 2 * ffn * hidden, ffn * hidden)
        table = config["padded_vocab_size"] * hidden
        return cls(
            layers=depth * sum(matrices),
            output=table,
            rest=table + depth * (2 * hidden + qkv) + hidden,
            widest=max(matrices),
            ffn=2 * ffn,
            heads=heads,
            kv=2 * depth * groups * head_dim,
            seq_length=config.get("seq_length", 2048),
            stored_bits=config.get("quantization_bit") or 16,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Raises ModelError naming the file or the field."""
        path = folder / "config.json"
        try:
            return cls.from_config(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"读不了 {path}（{error}）：请重新下载这个模型。",
                             f"Cannot read {path} ({error}): download the model again.") from None
        except KeyError as error:
            raise ModelError(f"{path} 里没有 {error} 一项，不是 ChatGLM 的模型。",
                             f"{path} has no {error}: not a ChatGLM model.") from None

    def weight_bytes(self, bits: int, item: int) -> int:
        """All weights, ``item`` bytes for each value that is not quantized."""
        quantized = 0 if bits == 16 else self.layers + self.output
        if self.stored_bits < 16:  # official quantized files keep the output matrix whole
            quantized = self.layers
        plain = self.layers + self.output + self.rest - quantized
        return int(quantized * STORED_BITS.get(bits, 0) / 8) + plain * item

    def full_house(self, *, bits: int, item: int, gpu: bool, slots: int, max_length: int, chunk: int) -> int:
        """Bytes with every slot full and the longest step (``chunk`` rows) under way; ``item`` as in weight_bytes."""
        cache = slots * max_length * self.kv * item
        scores = chunk * max_length * self.heads * 8  # float32, before and after softmax
        activations = chunk * self.ffn * 2 * item
        unpacked = 0 if bits == 16 else self.widest * (1 + 2 * item)  # one matrix of a layer at a time
        runtime = GPU_RUNTIME if gpu else CPU_RUNTIME
        return self.weight_bytes(bits, item) + cache + scores + activations + unpacked + runtime

"""How much memory a model takes, from the fields of its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ModelError

GiB = 2**30
# A quantized weight's bits with its share of the scale: float32 for 64 weights of 4 bits, float16 for 32 of 8.
STORED_BITS = {4: 4.5, 8: 8.5}
# Held beside weights and cache: the CUDA context with its libraries, or the Python process with torch.
GPU_RUNTIME = int(0.6 * GiB)
CPU_RUNTIME = int(0.5 * GiB)


class _NoNumber(Exception):
    """A field that must be a positive whole number and is something else: its name and what it is."""


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
    stored_tables: bool = False  # if its embedding is too
    tied: bool = False  # embedding and output are one matrix, until the output alone is quantized here
    prefix: int = 0  # P-tuning tokens, in front of every slot of the cache
    causal_prompt: bool = True  # False: read whole and in both directions, so nothing cached serves another prompt

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a config.json of any generation; raises KeyError for a field that is missing.

        A number that is written as text, or is none, raises an error of this module, which ``from_folder`` words.
        """
        return cls._of_chatglm(config) if "inner_hidden_size" in config else cls._of_chatglm2(config)

    @classmethod
    def _of_chatglm(cls, config: Mapping[str, Any]) -> ModelShape:
        depth, hidden, ffn = (_number(config, name) for name in ("num_layers", "hidden_size", "inner_hidden_size"))
        matrices = (3 * hidden * hidden, hidden * hidden, ffn * hidden, ffn * hidden)
        table = _number(config, "vocab_size") * hidden
        stored_bits = _number(config, "quantization_bit", none=16)
        return cls(
            layers=depth * sum(matrices),
            output=table,
            rest=table + depth * (9 * hidden + ffn) + 2 * hidden,
            widest=max(matrices),
            ffn=ffn,
            heads=_number(config, "num_attention_heads"),
            kv=2 * depth * hidden,
            seq_length=_number(config, "max_sequence_length"),
            stored_bits=stored_bits,
            stored_tables=stored_bits < 16 and bool(config.get("quantization_embeddings")),
            tied=True,
            prefix=_number(config, "pre_seq_len", none=0),
            causal_prompt=False,
        )

    @classmethod
    def _of_chatglm2(cls, config: Mapping[str, Any]) -> ModelShape:
        depth, hidden, ffn = (_number(config, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size"))
        heads, head_dim = _number(config, "num_attention_heads"), _number(config, "kv_channels")
        groups = _number(config, "multi_query_group_num", none=1) if config.get("multi_query_attention") else heads
        qkv = (heads + 2 * groups) * head_dim
        matrices = (qkv * hidden, heads * head_dim * hidden, 2 * ffn * hidden, ffn * hidden)
        table = _number(config, "padded_vocab_size") * hidden
        return cls(
            layers=depth * sum(matrices),
            output=table,
            rest=table + depth * (2 * hidden + qkv) + hidden,
            widest=max(matrices),
            ffn=2 * ffn,
            heads=heads,
            kv=2 * depth * groups * head_dim,
            seq_length=_number(config, "seq_length", none=2048),
            stored_bits=_number(config, "quantization_bit", none=16),
            prefix=_number(config, "pre_seq_len", none=0),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Raises ModelError naming the file or the field."""
        path = folder / "config.json"
        try:
            return cls.from_config(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"读不了 {path}（{error}）：请重新下载这个模型。",
                             f"Cannot read {path} ({error}): download the model again.") from None
        except _NoNumber as error:
            name, value = error.args
            raise ModelError(
                f"{path} 的 {name} 是 {value!r}，应为正整数（不加引号）：请改正，或换官方的 config.json。",
                f"{path}: {name} is {value!r}, it must be a positive whole number without quotes; correct it, or use "
                "the model's official config.json.", param=name) from None
        except KeyError as error:
            raise ModelError(f"{path} 里没有 {error} 一项，不是 ChatGLM 的模型。",
                             f"{path} has no {error}: not a ChatGLM model.") from None

    @property
    def keeps_output(self) -> bool:
        """Most of the official quantized files keep the output matrix in 16 bits."""
        return self.stored_bits < 16 and not self.stored_tables

    def weight_bytes(self, bits: int, item: int) -> int:
        """All weights, ``item`` bytes for each value that is not quantized."""
        quantized = 0 if bits == 16 else self.layers + self.output
        if self.keeps_output:
            quantized = self.layers
        plain = self.layers + self.output + self.rest - quantized
        if self.tied and (bits == 16 or self.stored_bits < 16):  # our own codes are of the output alone
            plain -= self.output
        return int(quantized * STORED_BITS.get(bits, 0) / 8) + plain * item

    def full_house(
        self, *, bits: int, item: int, gpu: bool, slots: int, max_length: int, chunk: int, kernels: bool = False
    ) -> int:
        """Bytes with every slot full and the longest step under way; ``item`` as in weight_bytes.

        A step has ``chunk`` rows of prompts, or a whole one beside them where the model reads those at once. The CPU
        ``kernels`` keep embeddings, keys and values in 16 bits beside float32, the output matrix of official quantized
        files in 8, and unpack nothing.
        """
        length, runtime = max_length + self.prefix, GPU_RUNTIME if gpu else CPU_RUNTIME
        rows = chunk + (max_length if not self.causal_prompt else 0)
        activations = rows * self.ffn * 2 * item
        if kernels:
            replaced = 0 if self.tied else 2  # bytes of each value of the output, which weight_bytes counts
            output = self.output * (STORED_BITS[8] / 8 - replaced) if self.keeps_output else 0
            return int(self.weight_bytes(bits, 2) + output + slots * length * self.kv * 2 + activations + runtime)
        cache = slots * length * self.kv * item
        scores = chunk * length * self.heads * 8  # float32, before and after softmax
        unpacked = 0 if bits == 16 else self.widest * (1 + 2 * item)  # one matrix of a layer at a time
        return self.weight_bytes(bits, item) + cache + scores + activations + unpacked + runtime


def _number(config: Mapping[str, Any], name: str, *, none: int | None = None) -> int:
    """A positive whole number; ``none`` is what a field says that is missing, null, or 0, where it may be."""
    value = config[name] if none is None else config.get(name) or none
    if type(value) is not int or (value < 1 and value != none):
        raise _NoNumber(name, value)
    return value

"""The network of ChatGLM2-6B, ChatGLM2-6B-32k, ChatGLM3-6B (also 32k and 128k) and CodeGeeX2-6B: one block for all.

A decoder with multi-query attention, rotary embedding on half of each head, SwiGLU and RMSNorm. Formulas and names are
those of the official ``modeling_chatglm.py``; parameters are named exactly as in the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from server.kernels.ops import Decoder, DecoderLayer, Ops
from server.models.base import ForwardBatch, KVCache, KVShape, Segment, token_embedding
from server.models.fields import flag, number, require

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class NetworkConfig:
    """What config.json says of the network, under its official names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    multi_query_group_num: int  # key/value heads
    kv_channels: int  # values per head
    ffn_hidden_size: int
    padded_vocab_size: int
    seq_length: int  # the positions that it was trained for
    layernorm_epsilon: float
    add_qkv_bias: bool
    rope_ratio: float

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Raises ModelError for a field that is missing, or whose value this network cannot have."""
        for name, value in _FIXED.items():
            require(config, name, flag(config, name) is value, str(value).lower())
        self = cls(
            **{name: number(config, name, int) for name in _SIZES},
            layernorm_epsilon=number(config, "layernorm_epsilon", float),
            add_qkv_bias=flag(config, "add_qkv_bias"),
            rope_ratio=number(config, "rope_ratio", float, default=1.0),
        )
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        require(config, "multi_query_group_num", heads % groups == 0, f"能整除 num_attention_heads {heads} 的数",
                f"a divisor of num_attention_heads {heads}")
        require(config, "kv_channels", self.kv_channels % 4 == 0, "4 的倍数", "a multiple of 4")
        return self


_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "ffn_hidden_size",
    "padded_vocab_size",
    "seq_length",
)
# no released model has other values, and the network below has no branch for them
_FIXED = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}


class Rotary:
    """The angles of rotary embedding: position / divisor * base^(-2t/width).

    Always float32. The official ChatGLM2 code builds its table in float16, where neither positions above 2048 nor the
    angles are exact (errors up to 2); ChatGLM3 and transformers' own GLM use float32, and so does training precision.
    Nothing is stored by position, so a conversation may be longer than ``seq_length``; it is only less well trained.
    """

    def __init__(self, width: int, *, base: float = ROTARY_BASE, divisor: float = 1.0):
        self._frequencies = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        self._divisor = divisor

    def cos_sin(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 [T] to float32 [T, width / 2, 2]: cosine and sine of every pair's angle."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = torch.outer(positions.float() / self._divisor, self._frequencies)
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)
        self._eps = eps
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, self._eps)


class SelfAttention(nn.Module):
    def __init__(self, config: NetworkConfig, layer: int, ops: Ops):
        super().__init__()
        self._layer = layer
        self._ops = ops
        self._heads = config.num_attention_heads
        self._groups = config.multi_query_group_num
        self._head_dim = config.kv_channels
        width = self._heads * self._head_dim
        fused = width + 2 * self._groups * self._head_dim
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.add_qkv_bias, device="meta")
        self.dense = nn.Linear(width, config.hidden_size, bias=False, device="meta")

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, segments: list[Segment], cache: KVCache) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (-1, self._head_dim))
        query, key, value = heads.split([self._heads, self._groups, self._groups], dim=1)
        # queries and keys lie side by side, and turn alike
        self._ops.rotary_interleaved(heads[:, : self._heads + self._groups], cos_sin)
        outputs, row = [], 0
        for segment in segments:
            rows = slice(row, row + segment.length)
            row += segment.length
            keys, values = cache.update(self._layer, segment, key[rows], value[rows])
            outputs.append(self._ops.attention(query[rows], keys, values))
        return self.dense(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig, ops: Ops):
        super().__init__()
        self._ops = ops
        # gate and up projection in one matrix, the gate first
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False, device="meta")
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self._ops.swiglu(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, index: int, ops: Ops):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon, ops)
        self.self_attention = SelfAttention(config, index, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, segments: list[Segment], cache: KVCache) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x), cos_sin, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def described(self, config: NetworkConfig) -> DecoderLayer:
        """For ``Ops.decoder``."""
        attention, mlp = self.self_attention, self.mlp
        return DecoderLayer(
            input_norm=self.input_layernorm.weight,
            query_key_value=attention.query_key_value.weight,
            bias=attention.query_key_value.bias,
            dense=attention.dense.weight,
            post_attention_norm=self.post_attention_layernorm.weight,
            h_to_4h=mlp.dense_h_to_4h.weight,
            to_h=mlp.dense_4h_to_h.weight,
            heads=config.num_attention_heads,
            groups=config.multi_query_group_num,
            head_dim=config.kv_channels,
            eps=config.layernorm_epsilon,
        )


class Embedding(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.word_embeddings = token_embedding(config.padded_vocab_size, config.hidden_size)


class Encoder(nn.Module):
    def __init__(self, config: NetworkConfig, ops: Ops):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i, ops) for i in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon, ops)
        self._config = config
        self._ops = ops

    @cached_property
    def _decoder(self) -> Decoder | None:
        """Made at the first step, when all weights are there."""
        return self._ops.decoder([layer.described(self._config) for layer in self.layers])

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, segments: list[Segment], cache: KVCache) -> torch.Tensor:
        if self._decoder:
            places = [(segment.slot, cache.offset + segment.start, segment.length) for segment in segments]
            if (y := self._decoder(x, cos_sin, places, cache.keys, cache.values)) is not None:
                return y
        for layer in self.layers:
            x = layer(x, cos_sin, segments, cache)
        return x


class Transformer(nn.Module):
    def __init__(self, config: NetworkConfig, ops: Ops):
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = Encoder(config, ops)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False, device="meta")


class ChatGLM2Network(nn.Module):
    """See ``models.base.Network``."""

    def __init__(self, config: NetworkConfig, ops: Ops, rotary: Rotary):
        super().__init__()
        self.kv_shape = KVShape(config.num_layers, config.multi_query_group_num, config.kv_channels)
        self.vocab_size = config.padded_vocab_size
        self.max_positions = config.seq_length
        self.transformer = Transformer(config, ops)
        self._rotary = rotary

    def context(self, prompt_ids: Sequence[int]) -> None:
        return None

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        segments = list(batch.segments)
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in segments])
        cos_sin = self._rotary.cos_sin(positions.to(batch.token_ids.device))
        encoder = self.transformer.encoder
        x = self.transformer.embedding.word_embeddings(batch.token_ids).to(encoder.final_layernorm.weight.dtype)
        x = encoder(x, cos_sin, segments, cache)
        wanted = encoder.final_layernorm(x[batch.logit_rows])
        return self.transformer.output_layer(wanted).float()

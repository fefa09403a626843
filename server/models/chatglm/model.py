"""The network of ChatGLM-6B, the first generation: a prefix language model with a two-dimensional rotary embedding.

Formulas and names are those of the official ``modeling_chatglm.py``; parameters are named exactly as in the official
checkpoints. Du et al., https://arxiv.org/abs/2103.10360.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.errors import BadRequest
from server.kernels.ops import Ops
from server.models.base import Context, ForwardBatch, KVCache, KVShape, Segment, token_embedding
from server.models.fields import flag, number, require

# a constructor default of the official code, which the official model never sets to its number of layers
RESIDUAL_SCALE = math.sqrt(2 * 28)


@dataclass(frozen=True)
class NetworkConfig:
    """What config.json says of the network, under its official names."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    inner_hidden_size: int
    vocab_size: int
    max_sequence_length: int
    bos_token_id: int
    mask_token_id: int
    gmask_token_id: int
    layernorm_epsilon: float

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Raises ModelError for a field that is missing, or whose value this network cannot have."""
        require(config, "position_encoding_2d", flag(config, "position_encoding_2d"), "true")
        # releases before April 2023 do not name the mask tokens, whose ids have the same distance in all releases
        bos = number(config, "bos_token_id", int)
        self = cls(
            **{name: number(config, name, int) for name in _SIZES},
            mask_token_id=number(config, "mask_token_id", int, default=bos - 4),
            gmask_token_id=number(config, "gmask_token_id", int, default=bos - 3),
            layernorm_epsilon=number(config, "layernorm_epsilon", float),
        )
        heads = self.num_attention_heads
        require(config, "hidden_size", self.hidden_size % (4 * heads) == 0, f"4 × {heads} 的倍数",
                f"a multiple of 4 * {heads} heads")
        return self


_SIZES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "inner_hidden_size",
    "vocab_size",
    "max_sequence_length",
    "bos_token_id",
)


class Rotary2D:
    """Half of each head turns with the position in the prompt, the other half with the position in the answer."""

    def __init__(self, width: int):
        # rounded to float16 as in the official code, in whatever dtype it computes; the angles are float32
        steps = torch.arange(0, width, 2, dtype=torch.float32) / width
        self._frequencies = (1.0 / 10000**steps).half().float()

    def cos_sin(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 [T, 2] to float32 [2, T, 2, width / 2]: cosine and sine for both halves of a head."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions.float().unsqueeze(-1) * self._frequencies
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, d], d = 2 halves of 2 * w values; value t of a half turns together with value t + w of it."""
    cos, sin = cos_sin.unsqueeze(2)
    first, second = x.unflatten(-1, (2, 2, -1)).float().unbind(-2)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return turned.flatten(-3).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def __init__(self, config: NetworkConfig):
        super().__init__(config.hidden_size, eps=config.layernorm_epsilon, device="meta")


class SelfAttention(nn.Module):
    def __init__(self, config: NetworkConfig, layer: int, ops: Ops):
        super().__init__()
        self._layer = layer
        self._ops = ops
        self._heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, device="meta")
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, device="meta")

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, segments: list[Segment], cache: KVCache) -> torch.Tensor:
        # query, key and value of one head lie side by side
        query, key, value = self.query_key_value(x).unflatten(-1, (self._heads, -1)).chunk(3, dim=-1)
        query, key = rotate(query, cos_sin), rotate(key, cos_sin)
        outputs, row = [], 0
        for segment in segments:
            rows = slice(row, row + segment.length)
            row += segment.length
            keys, values = cache.update(self._layer, segment, key[rows], value[rows])
            prefix = keys.shape[1] - segment.start - segment.length
            outputs.append(self._ops.attention(query[rows], keys, values, context=prefix + segment.context.length))
        return self.dense(torch.cat(outputs))


class MLP(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size, device="meta")
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, index: int, ops: Ops):
        super().__init__()
        self.input_layernorm = LayerNorm(config)
        self.attention = SelfAttention(config, index, ops)
        self.post_attention_layernorm = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, segments: list[Segment], cache: KVCache) -> torch.Tensor:
        # the residual is the normalised input, not the input
        x = self.input_layernorm(x)
        x = RESIDUAL_SCALE * x + self.attention(x, cos_sin, segments, cache)
        x = self.post_attention_layernorm(x)
        return RESIDUAL_SCALE * x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, config: NetworkConfig, ops: Ops):
        super().__init__()
        self.word_embeddings = token_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i, ops) for i in range(config.num_layers))
        self.final_layernorm = LayerNorm(config)


class ChatGLMNetwork(nn.Module):
    """See ``models.base.Network``."""

    # the official code takes one for the other, whatever the checkpoint holds
    tied = {"transformer.word_embeddings.weight": "lm_head.weight"}

    def __init__(self, config: NetworkConfig, ops: Ops):
        super().__init__()
        head_dim = config.hidden_size // config.num_attention_heads
        self.kv_shape = KVShape(config.num_layers, config.num_attention_heads, head_dim)
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_sequence_length
        self.transformer = Transformer(config, ops)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self._config = config
        self._rotary = Rotary2D(head_dim // 2)

    def context(self, prompt_ids: Sequence[int]) -> Context:
        ids = list(prompt_ids)
        config = self._config
        mask = config.gmask_token_id if config.gmask_token_id in ids else config.mask_token_id
        if mask not in ids or config.bos_token_id not in ids:
            raise BadRequest(
                f"prompt 里的 token id 不是 ChatGLM-6B 的提问：必须有 [gMASK]（{config.gmask_token_id}）或 "
                f"[MASK]（{config.mask_token_id}），还要有 <sop>（{config.bos_token_id}）；也可以直接发送文字。",
                f"The token ids of prompt are none of ChatGLM-6B's: they must have [gMASK] ({config.gmask_token_id}) "
                f"or [MASK] ({config.mask_token_id}), and <sop> ({config.bos_token_id}); or send the text itself.",
                param="prompt",
            )
        return Context(ids.index(config.bos_token_id), ids.index(mask))

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        segments = list(batch.segments)
        positions = torch.cat([_positions(segment) for segment in segments])
        cos_sin = self._rotary.cos_sin(positions.to(batch.token_ids.device))
        x = self.transformer.word_embeddings(batch.token_ids).to(self.transformer.final_layernorm.weight.dtype)
        for layer in self.transformer.layers:
            x = layer(x, cos_sin, segments, cache)
        return self.lm_head(self.transformer.final_layernorm(x[batch.logit_rows])).float()


def _positions(segment: Segment) -> torch.Tensor:
    """int64 [length, 2]: (n, 0) in the prompt; (place of the mask token, 1, 2, ...) from <sop> on."""
    index = torch.arange(segment.start, segment.start + segment.length)
    length, mask = segment.context
    return torch.stack([index.where(index < length, mask), (index - length + 1).clamp(min=0)], dim=1)

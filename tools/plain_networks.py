"""The ChatGLM family once more, written from its published formulas to judge server/: nothing of it is shared.

A whole sequence at once without a cache or a batch, a dense mask, complex numbers for the rotary embedding, the softmax
written out, P-tuning prefixes in front of keys and values. Parameters and modules bear the official names, so that
official checkpoints load with ``load_state_dict`` and peft can wrap the linears.

Formulas: the official modeling_chatglm.py of each model; Du et al., https://arxiv.org/abs/2103.10360.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("chatglm", "chatglm2", "chatglm3", "codegeex2")
# what the first ChatGLM-6B releases left to the constructor's defaults
EARLY_IDS = {"mask_token_id": 150000, "gmask_token_id": 150001, "bos_token_id": 150004}


def plain_network(config: Mapping[str, Any], family: str) -> nn.Module:
    """The network that ``config``, of an official config.json, describes; float32, weights not yet loaded.

    ``forward(ids)`` takes int64 [n] and returns logits float32 [n, vocab]; afterwards ``keys_values()`` gives what a
    cache would hold. ``load_state_dict`` ignores the rotary tables (``inv_freq``) that official checkpoints store.
    Raises ValueError for another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is none of {', '.join(FAMILIES)}")
    return ChatGLM(config) if family == "chatglm" else ChatGLM2(config, family)


class Plain(nn.Module):
    """What both architectures have in common; ``transformer`` holds the layers."""

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Of the last forward pass, [layers, prefix + n, groups, head_dim] each, keys after the rotary embedding."""
        keys, values = zip(*(block.seen for block in self.blocks), strict=True)
        return torch.stack(keys), torch.stack(values)

    def prefixes(self) -> list[tuple[Tensor, Tensor]] | list[None]:
        """For each layer the P-tuning prefix's keys and values, [m, groups, head_dim] each."""
        encoder = getattr(self.transformer, "prefix_encoder", None)
        if encoder is None:
            return [None] * len(self.blocks)
        rows = encoder().reshape(encoder.length, len(self.blocks), 2, self.groups, self.head_dim)
        return [(rows[:, i, 0], rows[:, i, 1]) for i in range(len(self.blocks))]


class PrefixEncoder(nn.Module):
    """P-tuning v2; Liu et al., https://arxiv.org/abs/2110.07602. ``forward()`` gives [length, width]."""

    def __init__(self, config: Mapping[str, Any], inner: int, width: int):
        super().__init__()
        self.length = config["pre_seq_len"]
        projected = config.get("prefix_projection", False)
        self.embedding = nn.Embedding(self.length, inner if projected else width)
        if projected:
            self.trans = nn.Sequential(nn.Linear(inner, config["hidden_size"]), nn.Tanh())
            self.trans.append(nn.Linear(config["hidden_size"], width))

    def forward(self) -> Tensor:
        rows = self.embedding(torch.arange(self.length))
        return self.trans(rows) if hasattr(self, "trans") else rows


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """query [n, H, d], key and value [m, G, d], ``hidden`` bool [n, m]; [n, H * d]. The softmax in float32."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", query, key).float() / math.sqrt(query.shape[2])
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = (weights / weights.sum(-1, keepdim=True)).to(value.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)


def behind(prefix: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    if prefix is None:
        return key, value
    return torch.cat([prefix[0].to(key.dtype), key]), torch.cat([prefix[1].to(value.dtype), value])


def hidden_keys(visible: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    """The mask of ``attend`` for tokens [n, n], with a column for each prefix token, which everybody sees."""
    length = 0 if prefix is None else len(prefix[0])
    return ~torch.cat([visible.new_ones(len(visible), length), visible], dim=1)


def turn(real: Tensor, imaginary: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate points [n, H, t] by angles float32 [n, t]."""
    points = torch.complex(real.float(), imaginary.float()) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return points.real.to(real.dtype), points.imag.to(real.dtype)


def frequencies(width: int, base: float) -> Tensor:
    return 1 / base ** (torch.arange(0, width, 2).float() / width)


class RMSNorm(nn.Module):
    """Zhang and Sennrich, https://arxiv.org/abs/1910.07467; a bfloat16 CodeGeeX2 squares and sums in bfloat16."""

    def __init__(self, size: int, eps: float, *, coarse: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.coarse = coarse

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.coarse and x.dtype == torch.bfloat16 else x.float()
        return (self.weight * (x * (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt())).to(x.dtype)


class ChatGLM2(Plain):
    """ChatGLM2, ChatGLM3 and CodeGeeX2."""

    def __init__(self, config: Mapping[str, Any], family: str):
        super().__init__()
        self.groups, self.head_dim = config["multi_query_group_num"], config["kv_channels"]
        ratio = config.get("rope_ratio", 1)
        # a long context: ChatGLM2 stretches the positions, ChatGLM3 the base
        self.base, self.stretch = (10000 * ratio, 1) if family == "chatglm3" else (10000, ratio)
        hidden, vocab = config["hidden_size"], config["padded_vocab_size"]
        parts = {
            "embedding": nn.ModuleDict({"word_embeddings": nn.Embedding(vocab, hidden)}),
            "encoder": nn.ModuleDict(
                {
                    "layers": nn.ModuleList(Block2(config, family) for _ in range(config["num_layers"])),
                    "final_layernorm": norm2(config, family),
                }
            ),
            "output_layer": nn.Linear(hidden, vocab, bias=False),
        }
        if config.get("pre_seq_len"):
            width = 2 * config["num_layers"] * self.groups * self.head_dim
            parts["prefix_encoder"] = PrefixEncoder(config, width, width)
        self.transformer = nn.ModuleDict(parts)
        self.register_load_state_dict_pre_hook(_drop_rotary_tables)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.encoder.layers

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(len(ids)).float() / self.stretch
        angles = torch.outer(positions, frequencies(self.head_dim // 2, self.base))
        visible = torch.ones(len(ids), len(ids)).tril().bool()
        x = self.transformer.embedding.word_embeddings(ids)
        for block, prefix in zip(self.blocks, self.prefixes(), strict=True):
            x = block(x, angles, visible, prefix)
        return self.transformer.output_layer(self.transformer.encoder.final_layernorm(x)).float()


def norm2(config: Mapping[str, Any], family: str) -> RMSNorm:
    return RMSNorm(config["hidden_size"], config["layernorm_epsilon"], coarse=family == "codegeex2")


class Block2(nn.Module):
    def __init__(self, config: Mapping[str, Any], family: str):
        super().__init__()
        hidden, ffn, self.head_dim = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
        width, narrow = (self.head_dim * config[name] for name in ("num_attention_heads", "multi_query_group_num"))
        self.widths = [width, narrow, narrow]
        self.input_layernorm = norm2(config, family)
        fused = nn.Linear(hidden, sum(self.widths), bias=config["add_qkv_bias"])
        self.self_attention = nn.ModuleDict({"query_key_value": fused, "dense": nn.Linear(width, hidden, bias=False)})
        self.post_attention_layernorm = norm2(config, family)
        self.mlp = nn.ModuleDict(
            {
                "dense_h_to_4h": nn.Linear(hidden, 2 * ffn, bias=False),
                "dense_4h_to_h": nn.Linear(ffn, hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, angles: Tensor, visible: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        fused = self.self_attention.query_key_value(self.input_layernorm(x))
        query, key, value = (part.unflatten(1, (-1, self.head_dim)) for part in fused.split(self.widths, dim=1))
        key, value = behind(prefix, self.turned(key, angles), value)
        self.seen = key, value
        attention = attend(self.turned(query, angles), key, value, hidden_keys(visible, prefix))
        x = x + self.self_attention.dense(attention)
        gate, up = self.mlp.dense_h_to_4h(self.post_attention_layernorm(x)).tensor_split(2, dim=1)
        return x + self.mlp.dense_4h_to_h(gate * torch.sigmoid(gate) * up)

    def turned(self, heads: Tensor, angles: Tensor) -> Tensor:
        """Neighbouring values of the first half of each head are the points; the second half stays."""
        moving, still = heads.tensor_split(2, dim=2)
        pairs = turn(moving[..., 0::2], moving[..., 1::2], angles)
        return torch.cat([torch.stack(pairs, dim=3).flatten(2), still], dim=2)


class ChatGLM(Plain):
    """ChatGLM-6B, the first generation."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        self.groups = config["num_attention_heads"]
        self.head_dim = hidden // self.groups
        self.ids = {name: config.get(name, early) for name, early in EARLY_IDS.items()}
        parts = {
            "word_embeddings": nn.Embedding(vocab, hidden),
            "layers": nn.ModuleList(Block1(config) for _ in range(config["num_layers"])),
            "final_layernorm": norm1(config),
        }
        if config.get("pre_seq_len"):
            parts["prefix_encoder"] = PrefixEncoder(config, hidden, 2 * config["num_layers"] * hidden)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.transformer.word_embeddings.weight
        self.register_load_state_dict_pre_hook(_drop_rotary_tables)
        self.register_load_state_dict_pre_hook(_tie)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.layers

    def forward(self, ids: Tensor) -> Tensor:
        n, tokens = len(ids), ids.tolist()
        start = tokens.index(self.ids["bos_token_id"])
        gmask, mask = self.ids["gmask_token_id"], self.ids["mask_token_id"]
        blank = tokens.index(gmask if gmask in tokens else mask)
        # the place in the prompt, which stays at the blank's in the answer; and the place in the answer, from 1
        places = [[i, 0] if i < start else [blank, i - start + 1] for i in range(n)]
        steps = frequencies(self.head_dim // 2, 10000).half().float()
        angles = torch.tensor(places).float().unsqueeze(2) * steps  # [n, 2, t]
        visible = torch.ones(n, n).tril().bool() | (torch.arange(n) < start)
        x = self.transformer.word_embeddings(ids)
        for block, prefix in zip(self.blocks, self.prefixes(), strict=True):
            x = block(x, angles, visible, prefix)
        return self.lm_head(self.transformer.final_layernorm(x)).float()


def norm1(config: Mapping[str, Any]) -> nn.LayerNorm:
    return nn.LayerNorm(config["hidden_size"], eps=config["layernorm_epsilon"])


class Block1(nn.Module):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        hidden, inner, self.heads = config["hidden_size"], config["inner_hidden_size"], config["num_attention_heads"]
        self.input_layernorm = norm1(config)
        self.attention = nn.ModuleDict(
            {"query_key_value": nn.Linear(hidden, 3 * hidden), "dense": nn.Linear(hidden, hidden)}
        )
        self.post_attention_layernorm = norm1(config)
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(hidden, inner), "dense_4h_to_h": nn.Linear(inner, hidden)})

    def forward(self, x: Tensor, angles: Tensor, visible: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
        alpha = math.sqrt(56)  # of 28 layers, however many there are: a default that the official config never sets
        x = self.input_layernorm(x)
        # [n, heads, 3, d]: query, key and value of one head lie side by side
        query, key, value = self.attention.query_key_value(x).unflatten(1, (self.heads, 3, -1)).unbind(2)
        key, value = behind(prefix, self.turned(key, angles), value)
        self.seen = key, value
        attention = attend(self.turned(query, angles), key, value, hidden_keys(visible, prefix))
        x = self.post_attention_layernorm(alpha * x + self.attention.dense(attention))
        u = self.mlp.dense_h_to_4h(x)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return alpha * x + self.mlp.dense_4h_to_h(u)

    def turned(self, heads: Tensor, angles: Tensor) -> Tensor:
        """Each half of a head turns by its own angle; a point's coordinates lie half of that half apart."""
        a, b, c, d = heads.tensor_split(4, dim=2)
        return torch.cat([*turn(a, b, angles[:, 0]), *turn(c, d, angles[:, 1])], dim=2)


def _drop_rotary_tables(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    for name in [name for name in state if name.endswith("inv_freq")]:
        del state[name]


def _tie(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """from_pretrained makes the output layer the embedding, whatever the checkpoint stores for it."""
    embedding = "transformer.word_embeddings.weight"
    if embedding in state:
        state["lm_head.weight"] = state[embedding]

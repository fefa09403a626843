"""P-tuning v2: trained keys and values that stand in front of every conversation.

Liu et al., https://arxiv.org/abs/2110.07602; the official PrefixEncoder of modeling_chatglm.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from server.errors import ModelError
from server.models.base import KVShape

PREFIX_TENSORS = "transformer.prefix_encoder."

Prefix = tuple[torch.Tensor, torch.Tensor]  # keys, values, each [layers, n, groups, head_dim]


def build_prefix(tensors: Mapping[str, torch.Tensor], shape: KVShape) -> Prefix:
    """Keys (not rotated) and values from the ``transformer.prefix_encoder.*`` tensors, float32.

    The number of prefix tokens is the embedding's number of rows, whatever config.json's pre_seq_len says. Raises
    ModelError for a tensor that is missing or has another model's shape.
    """

    def stored(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ModelError(
                f"P-tuning 权重里缺少 {name}；请检查 checkpoint 是否完整。",
                f"The P-tuning weights lack {name}; check that the checkpoint is complete.",
            )
        return tensors[name].float()

    out = stored(PREFIX_TENSORS + "embedding.weight")
    if PREFIX_TENSORS + "trans.0.weight" in tensors:  # prefix_projection
        for layer, last in (("trans.0", False), ("trans.2", True)):
            out = F.linear(out, stored(f"{PREFIX_TENSORS}{layer}.weight"), stored(f"{PREFIX_TENSORS}{layer}.bias"))
            out = out if last else out.tanh()
    width = 2 * shape.layers * shape.groups * shape.head_dim
    if out.shape[1] != width:
        raise ModelError(
            f"P-tuning 权重每个 token 有 {out.shape[1]} 个数，这个模型需要 {width} 个；它是为另一个模型训练的。",
            f"The P-tuning weights have {out.shape[1]} values per token and this model needs {width}: they were "
            "trained for another model.",
        )
    by_layer = out.view(-1, shape.layers, 2, shape.groups, shape.head_dim).transpose(0, 1)
    return by_layer[:, :, 0], by_layer[:, :, 1]

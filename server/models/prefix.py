"""P-tuning v2: trained keys and values that stand in front of every conversation.

Liu et al., https://arxiv.org/abs/2110.07602; the official PrefixEncoder of modeling_chatglm.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from server.errors import ModelError
from server.models.base import KVShape
from server.models.checkpoint import read_tensors, weight_files

log = logging.getLogger(__name__)

PREFIX_TENSORS = "transformer.prefix_encoder."
_EMBEDDING = "embedding.weight"
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
_PARTS = (_EMBEDDING, *_PROJECTION)

Prefix = tuple[torch.Tensor, torch.Tensor]  # keys, values, each [layers, n, groups, head_dim]


def read_prefix(folder: Path) -> dict[str, torch.Tensor]:
    """The ``transformer.prefix_encoder.*`` tensors of a P-tuning checkpoint, with or without that beginning.

    What else the checkpoint holds is not used. Raises ModelError where there is no such tensor.
    """
    found, ignored = {}, []
    for file in weight_files(folder):
        for name, tensor in read_tensors(file):
            full = PREFIX_TENSORS + name if name in _PARTS else name
            if full.startswith(PREFIX_TENSORS):
                found[full] = tensor
            else:
                ignored.append(name)
    if not found:
        raise _refused(folder, f"里没有 P-tuning 权重（{PREFIX_TENSORS}*）",
                       f"holds no P-tuning weights ({PREFIX_TENSORS}*)")
    warn_of_ignored(ignored, folder)
    return found


def warn_of_ignored(names: list[str], folder: Path) -> None:
    if names:
        log.warning("ignored %d unknown tensors in %s, first %s", len(names), folder, names[0])


def build_prefix(tensors: Mapping[str, torch.Tensor], shape: KVShape, folder: Path, *, projected: bool) -> Prefix:
    """Keys (not rotated) and values from the ``transformer.prefix_encoder.*`` tensors of ``folder``, float32.

    The number of prefix tokens is the embedding's number of rows, whatever config.json's pre_seq_len says.
    ``projected``: whether config.json asks for the projection, which is made in any case where its weights are there.
    Raises ModelError for a tensor that is missing, unknown, or of another model's shape.
    """
    parts = {name.removeprefix(PREFIX_TENSORS): tensor.float() for name, tensor in tensors.items()}
    projected = projected or any(name in parts for name in _PROJECTION)
    wanted = _PARTS if projected else (_EMBEDDING,)
    for name in wanted:
        if name not in parts:
            raise _lacks(folder, PREFIX_TENSORS + name)
    for name in parts.keys() - set(wanted):
        raise _refused(folder, f"里的 {PREFIX_TENSORS}{name} 不是 P-tuning v2 的权重",
                       f"holds {PREFIX_TENSORS}{name}, which P-tuning v2 does not have")
    try:
        out = parts[_EMBEDDING]
        if projected:
            out = F.linear(out, parts["trans.0.weight"], parts["trans.0.bias"]).tanh()
            out = F.linear(out, parts["trans.2.weight"], parts["trans.2.bias"])
        tokens, width = out.shape
    except (RuntimeError, ValueError):
        shapes = ", ".join(f"{name} {list(parts[name].shape)}" for name in wanted)
        raise _refused(folder, f"里 P-tuning 权重的形状互相不配（{shapes}）",
                       f"holds P-tuning weights whose shapes do not fit each other ({shapes})") from None
    needed = 2 * shape.layers * shape.groups * shape.head_dim
    if width != needed:
        raise _refused(folder, f"里的 P-tuning 权重每个 token 有 {width} 个数，这个模型需要 {needed} 个",
                       f"holds P-tuning weights with {width} values per token, and this model needs {needed}")
    by_layer = out.view(tokens, shape.layers, 2, shape.groups, shape.head_dim).transpose(0, 1)
    return by_layer[:, :, 0], by_layer[:, :, 1]


def _lacks(folder: Path, name: str) -> ModelError:
    return ModelError(
        f"{folder} 里没有 P-tuning 权重 {name}；如果它在另一个文件夹里，请用 --ptuning 指定那个文件夹，"
        "不用 P-tuning 就从 config.json 里删掉 pre_seq_len。",
        f"{folder} has no P-tuning weight {name}: if it lies in another folder, name that with --ptuning; without "
        "P-tuning, take pre_seq_len out of config.json.",
        param="ptuning",
    )


def _refused(folder: Path, zh: str, en: str) -> ModelError:
    return ModelError(
        f"{folder} {zh}；请检查 --ptuning，它要为这个模型训练的 checkpoint 文件夹。",
        f"{folder} {en}; check --ptuning: it takes the folder of a checkpoint that was trained for this model.",
        param="ptuning",
    )

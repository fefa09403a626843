"""LoRA adapters as PEFT saves them, merged into the weights while a checkpoint is read.

Hu et al., https://arxiv.org/abs/2106.09685; rank-stabilized: https://arxiv.org/abs/2312.03732; DoRA:
https://arxiv.org/abs/2402.09353. The files: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from server.models.checkpoint import read_tensors
from server.models.files import missing
from server.models.lora_config import CONFIG_FILE, LoraConfig, refused

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPER = "base_model.model."  # what PEFT puts in front of the base model's names
# how the names of a module's matrices end; the embedding's are transposed
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDE = ".lora_magnitude_vector"


class Change(NamedTuple):
    """W' = W + scale * up @ down; a ``magnitude`` gives every row of that its length (DoRA)."""

    up: torch.Tensor  # [rows, rank]
    down: torch.Tensor  # [rank, columns]
    scale: float
    magnitude: torch.Tensor | None  # [rows]


class Lora:
    """An adapter that fits a network: what becomes of the network's tensors, under their official names."""

    def __init__(self, file: Path, changes: Mapping[str, Change], replaced: Mapping[str, torch.Tensor]):
        self.file = file
        self._changes = changes
        self._replaced = replaced  # biases, and modules that were trained as a whole

    def __str__(self) -> str:
        ranks = sorted({change.down.shape[0] for change in self._changes.values()}) or [0]
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{len(self._changes)} matrices changed ({rank}), {len(self._replaced)} tensors replaced, {self.file}"

    def concerns(self, name: str) -> bool:
        return name in self._changes or name in self._replaced

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of a stored tensor, on that one's device: float32 where there is something to add."""
        tensor = self._replaced[name].to(tensor.device) if name in self._replaced else tensor
        if name not in self._changes:
            return tensor
        up, down, scale, magnitude = self._changes[name]
        weight = tensor.to(torch.float32, copy=True)
        weight.addmm_(up.to(weight), down.to(weight), alpha=scale)
        if magnitude is not None:
            weight *= (magnitude.to(weight) / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        return weight


def read_lora(folder: Path, network: nn.Module) -> Lora:
    """The adapter in ``folder``, for a network whose weights are not there yet.

    Raises ModelError naming file, field or tensor for everything that could not be applied as it was trained: nothing
    of an adapter is left out in silence.
    """
    config = LoraConfig.read(folder / CONFIG_FILE)
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if file is None:
        raise missing(folder / WEIGHT_FILES[0])
    sorter = _Sorter(file, config, network)
    for name, tensor in read_tensors(file):
        sorter.add(name, tensor)
    return sorter.finish()


class _Sorter:
    """Finds the places of an adapter's tensors in a network, and checks that they fit."""

    def __init__(self, file: Path, config: LoraConfig, network: nn.Module):
        self._file = file
        self._config = config
        self._shapes = {name: tuple(p.shape) for name, p in network.named_parameters(remove_duplicate=False)}
        # the ends of the names that a module's tensors must have, all of them
        self._ends: dict[str, tuple[str, ...]] = {}
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                self._ends[name] = (*_LINEAR, _MAGNITUDE) if config.magnitudes else _LINEAR
            elif isinstance(module, nn.Embedding):
                self._ends[name] = _EMBEDDING
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._replaced: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        official = name.removeprefix(_WRAPPER).replace(".base_layer.", ".")
        if official in self._shapes:
            self._replaced[official] = self._fitting(name, tensor, self._shapes[official])
            return
        for end in (*_LINEAR, *_EMBEDDING, _MAGNITUDE):
            module = official.removesuffix(end)
            if module != official and end in self._ends.get(module, ()):
                self._parts.setdefault(module, {})[end] = tensor
                return
        raise refused(
            self._file, f"里的 {name} 在这个模型里没有位置", f"holds {name}, for which this model has no place"
        )

    def finish(self) -> Lora:
        if not self._parts and not self._replaced:
            raise refused(self._file, "里没有 LoRA 的权重", "holds no LoRA weights")
        for module in self._ends:
            if self._config.is_target(module) and module + ".weight" not in self._replaced:
                self._parts.setdefault(module, {})
        changes = {module + ".weight": self._change(module, parts) for module, parts in self._parts.items()}
        return Lora(self._file, changes, self._replaced)

    def _change(self, module: str, parts: dict[str, torch.Tensor]) -> Change:
        for end in self._ends[module]:
            if end not in parts:
                raise refused(self._file, f"里缺少 {module}{end}", f"lacks {module}{end}")
        rank, scale = self._config.rank_of(module), self._config.scale_of(module)
        rows, columns = self._shapes[module + ".weight"]
        down, up = (parts[end] for end in self._ends[module][:2])
        if self._ends[module] == _EMBEDDING:
            # PEFT adds (B A)^T to an embedding [ids, values]: A [rank, ids], B [values, rank]
            up = self._fitting(module + _EMBEDDING[0], down, (rank, rows)).T
            down = self._fitting(module + _EMBEDDING[1], parts[_EMBEDDING[1]], (columns, rank)).T
            return Change(up, down, scale, None)
        down = self._fitting(module + _LINEAR[0], down, (rank, columns))
        up = self._fitting(module + _LINEAR[1], up, (rows, rank))
        magnitude = parts.get(_MAGNITUDE)
        if magnitude is not None:
            magnitude = self._fitting(module + _MAGNITUDE, magnitude, (rows,))
        return Change(up, down, scale, magnitude)

    def _fitting(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if tuple(tensor.shape) != shape:
            raise refused(
                self._file,
                f"里 {name} 的形状是 {list(tensor.shape)}，应为 {list(shape)}",
                f"gives {name} the shape {list(tensor.shape)}, it should be {list(shape)}",
            )
        return tensor

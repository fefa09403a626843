"""Puts stored tensors into their places in a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from server.errors import ModelError
from server.kernels.ops import Ops, QuantWeight
from server.kernels.torch_ops import dequantize
from server.models.lora import Lora
from server.models.prefix import PREFIX_TENSORS, warn_of_ignored
from server.quant.formats import from_official
from server.quant.linear import QuantEmbedding, QuantLinear


class Filler:
    """Checks, moves, and casts or quantizes one tensor at a time; a LoRA is merged in float32 before that.

    ``prefix`` collects the checkpoint's own P-tuning tensors.
    """

    def __init__(
        self,
        network: nn.Module,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        bits: int,
        ops: Ops,
        lora: Lora | None,
    ):
        self.prefix: dict[str, torch.Tensor] = {}
        self._network = network
        self._dtype = dtype
        self._device = device
        self._bits = bits
        self._ops = ops
        self._lora = lora
        self._quantize = bits < (config.get("quantization_bit") or 16)
        self._tied: Mapping[str, str] = getattr(network, "tied", {})  # source: what takes its value
        self._sources = {target: source for source, target in self._tied.items()}
        self._shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        self._linear = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        self._missing = dict.fromkeys(name for name in self._shapes if name not in self._sources)
        self._needed = len(self._missing)
        self._halves: dict[str, torch.Tensor] = {}  # official codes and scales that wait for each other
        self._ignored: list[str] = []

    def add(self, name: str, tensor: torch.Tensor, file: Path) -> None:
        """Tensors of other models and training are ignored: a checkpoint may hold more than is needed."""
        weight = name.removesuffix("_scale")
        if name.startswith(PREFIX_TENSORS):
            self.prefix[name] = tensor
        elif weight in self._sources and self._sources[weight] not in self._missing:
            return  # the source counts, which may be stored under this name alone
        elif len(self._shapes.get(weight, ())) == 2 and (weight != name or tensor.dtype == torch.int8):
            self._halves[name] = tensor
            if weight in self._halves and weight + "_scale" in self._halves:
                self._fill(weight, self._codes(weight, file))
        elif name in self._shapes:
            self._expect(name, tensor, self._shapes[name], file)
            self._fill(name, tensor)
        elif not name.endswith("inv_freq"):  # the rotary table's, which is computed
            self._ignored.append(name)

    def finish(self, folder: Path) -> None:
        """Checks that nothing is missing."""
        warn_of_ignored(self._ignored, folder)
        if self.prefix and len(self._missing) == self._needed:
            raise ModelError(
                f"{folder} 是 P-Tuning 训练出的 checkpoint，不是完整的模型：请用 --model 指定训练时用的原模型，"
                f"再加 --ptuning {folder}。",
                f"{folder} is a P-Tuning checkpoint and no whole model: name the model that it was trained on with "
                f"--model, and add --ptuning {folder}.",
                param="model",
            )
        if self._missing:
            name = next((f"{n}_scale" for n in self._missing if n in self._halves), next(iter(self._missing)))
            raise ModelError(
                f"模型文件夹 {folder} 的权重里缺少 {name}（共缺 {len(self._missing)} 个张量）；文件不全，请重新下载。",
                f"The weights in {folder} lack {name} ({len(self._missing)} tensors in all): files are missing, "
                "download the model again.",
            )

    def _codes(self, name: str, file: Path) -> QuantWeight:
        """An official int8 or int4 matrix."""
        codes, scales = self._halves.pop(name), self._halves.pop(name + "_scale")
        rows, columns = self._shapes[name]
        self._expect(name, codes, (rows, columns if codes.shape[-1] == columns else columns // 2), file)
        self._expect(name + "_scale", scales, (rows,), file)
        return from_official(codes.to(self._device), scales.to(self._device), columns)

    def _fill(self, name: str, stored: torch.Tensor | QuantWeight) -> None:
        """A stored tensor into its place, and into the one that is tied to that."""
        name = self._sources.get(name, name)
        self._missing.pop(name, None)
        placed = self._place(name, stored)
        if name in self._tied:
            both = (name, self._tied[name])
            shared = not self._quantize and self._ops.dense_bits == 16 and not any(map(self._is_adapted, both))
            self._place(self._tied[name], placed if shared else stored)

    def _place(self, name: str, stored: torch.Tensor | QuantWeight) -> torch.Tensor | QuantWeight:
        """Returns what now is in the place: codes, or a tensor in the dtype and on the device of the network."""
        bits = 16
        if name in self._linear:
            bits = self._bits if self._quantize else self._ops.dense_bits
        if isinstance(stored, QuantWeight):
            if stored.bits <= self._bits < 16:
                if not self._is_adapted(name):
                    return self._place_codes(name, stored)
                bits = stored.bits  # the changed matrix has codes again, in groups of our own
            stored = dequantize(stored, torch.float32)
        tensor = stored.to(self._device)
        if self._is_adapted(name):
            tensor = self._lora.merge(name, tensor)
        if bits < 16:
            return self._place_codes(name, self._ops.quantize(tensor, bits))
        owner, _, attribute = name.rpartition(".")
        module = self._network.get_submodule(owner)
        placed = tensor.to(self._table_dtype(tensor) if isinstance(module, nn.Embedding) else self._dtype)
        setattr(module, attribute, nn.Parameter(placed, requires_grad=False))
        return placed

    def _table_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        """An embedding's rows are only looked up: beside float32 they stay in the 16 bits that they come in."""
        if self._ops.storage is None or self._dtype != torch.float32:
            return self._dtype
        return tensor.dtype if tensor.dtype.itemsize == 2 else self._ops.storage

    def _place_codes(self, name: str, weight: QuantWeight) -> QuantWeight:
        path = name.removesuffix(".weight")
        owner, _, child = path.rpartition(".")
        if name in self._linear:
            module = QuantLinear(self._ops.prepare(weight), self._network.get_submodule(path).bias, self._ops)
        else:
            module = QuantEmbedding(weight, self._dtype)
        setattr(self._network.get_submodule(owner), child, module)
        return weight

    def _is_adapted(self, name: str) -> bool:
        return self._lora is not None and self._lora.concerns(name)

    @staticmethod
    def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], file: Path) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(
                f"{file} 里 {name} 的形状是 {list(tensor.shape)}，按 config.json 应为 {list(shape)}；"
                "config.json 和权重不是同一个模型的。",
                f"{name} in {file} has shape {list(tensor.shape)}, config.json asks for {list(shape)}: config.json and "
                "weights belong to different models.",
            )

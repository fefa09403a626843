"""From an official checkpoint folder to a network that is ready to compute."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from server.errors import ModelError
from server.kernels.ops import Ops, QuantWeight
from server.kernels.torch_ops import dequantize
from server.models.base import Family, Network, Tokenizer
from server.models.checkpoint import read_tensors, weight_files
from server.models.families import AUTO, find_family
from server.models.files import read_json
from server.models.prefix import PREFIX_TENSORS, Prefix, build_prefix
from server.quant.formats import from_official
from server.quant.linear import QuantLinear

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of the weight files read so far, and in all


@dataclass(frozen=True)
class LoadedModel:
    """What the engine needs of a model. ``prefix`` is a P-tuning prefix for the KV cache, or None."""

    name: str
    family: Family
    config: Mapping[str, Any]
    network: Network
    tokenizer: Tokenizer
    prefix: Prefix | None
    dtype: torch.dtype
    device: torch.device


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    bits: int = 16,
    ops: Ops,
    family: str = AUTO,
    progress: Progress | None = None,
) -> LoadedModel:
    """Read an unchanged official checkpoint folder.

    ``dtype`` is what is computed in; ``bits`` 8 or 4 quantizes every linear layer while it is read. An official
    quantized checkpoint of at most ``bits`` bits keeps its codes, and the layers that it leaves in 16 bits stay so.
    Peak memory is the finished model and one tensor. Raises ModelError naming the file, field or tensor at fault.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    found = find_family(config, folder, family)
    tokenizer = found.load_tokenizer(folder)
    network, tuned = load_network(
        folder, config, found, dtype=dtype, device=device, bits=bits, ops=ops, progress=progress
    )
    if tokenizer.vocab_size > network.vocab_size:
        raise ModelError(
            f"{folder} 的分词器有 {tokenizer.vocab_size} 个词，模型只有 {network.vocab_size} 个；"
            "tokenizer.model 和权重不是同一个模型的。",
            f"The tokenizer in {folder} has {tokenizer.vocab_size} ids and the network {network.vocab_size}: "
            "tokenizer.model and weights belong to different models.",
        )
    name = folder.resolve().name
    return LoadedModel(name, found, config, network, tokenizer, tuned, dtype, torch.device(device))


def load_network(
    folder: Path,
    config: Mapping[str, Any],
    family: Family,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    bits: int = 16,
    ops: Ops,
    progress: Progress | None = None,
) -> tuple[Network, Prefix | None]:
    """The network alone; see ``load_model``."""
    network = family.build_network(config, ops)
    filler = _Filler(network, config, dtype=dtype, device=torch.device(device), bits=bits, ops=ops)
    files = weight_files(folder)
    total = sum(path.stat().st_size for path in files)
    done = 0
    for path in files:
        for name, tensor in read_tensors(path):
            filler.add(name, tensor, path)
            done += tensor.nbytes
            if progress:
                progress(min(done, total), total)
    return network.eval(), filler.finish(folder)


class _Filler:
    """Puts stored tensors into their places in a network: checked, moved, cast or quantized, one at a time."""

    def __init__(
        self,
        network: nn.Module,
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: torch.device,
        bits: int,
        ops: Ops,
    ):
        self._network = network
        self._dtype = dtype
        self._device = device
        self._bits = bits
        self._ops = ops
        self._quantize = bits < (config.get("quantization_bit") or 16)
        self._has_prefix = bool(config.get("pre_seq_len"))
        self._tied = getattr(network, "tied", {})  # source: what takes its value
        self._empty = {name: tuple(p.shape) for name, p in network.named_parameters()}
        for name in self._tied.values():
            del self._empty[name]
        self._halves: dict[str, torch.Tensor] = {}  # official codes and scales that wait for each other
        self._prefix: dict[str, torch.Tensor] = {}
        self._ignored: list[str] = []

    def add(self, name: str, tensor: torch.Tensor, file: Path) -> None:
        """Tensors of other models and training are ignored: a checkpoint may hold more than is needed."""
        weight = name.removesuffix("_scale")
        if name.startswith(PREFIX_TENSORS):
            self._prefix[name] = tensor
        elif weight in self._empty and (weight != name or tensor.dtype == torch.int8):
            self._halves[name] = tensor
            if weight in self._halves and weight + "_scale" in self._halves:
                self._place_codes(weight, file)
        elif name in self._empty:
            self._expect(name, tensor, self._empty[name], file)
            self._place(name, tensor)
        elif name not in self._tied.values() and not name.endswith("inv_freq"):  # the rotary table's, which is computed
            self._ignored.append(name)

    def finish(self, folder: Path) -> Prefix | None:
        """Checks that nothing is missing; returns the P-tuning prefix."""
        if self._ignored:
            log.warning("ignored %d unknown tensors in %s, first %s", len(self._ignored), folder, self._ignored[0])
        if self._empty:
            name = next((f"{n}_scale" for n in self._empty if n in self._halves), next(iter(self._empty)))
            raise ModelError(
                f"模型文件夹 {folder} 的权重里缺少 {name}（共缺 {len(self._empty)} 个张量）；文件不全，请重新下载。",
                f"The weights in {folder} lack {name} ({len(self._empty)} tensors in all): files are missing, download "
                "the model again.",
            )
        if not self._prefix and not self._has_prefix:
            return None
        keys, values = build_prefix(self._prefix, self._network.kv_shape)
        return keys.to(self._device, self._dtype), values.to(self._device, self._dtype)

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self._network.get_submodule(owner)
        self._empty.pop(name, None)
        if self._quantize and attribute == "weight" and isinstance(module, nn.Linear):
            self._place_quantized(name, self._ops.quantize(tensor.to(self._device), self._bits))
            return
        placed = tensor.to(self._device, self._dtype)
        setattr(module, attribute, nn.Parameter(placed, requires_grad=False))
        if name in self._tied:
            self._place(self._tied[name], placed)

    def _place_codes(self, name: str, file: Path) -> None:
        """An official int8 or int4 matrix: kept as it is, unless the caller wants it with more or fewer bits."""
        codes, scales = self._halves.pop(name), self._halves.pop(name + "_scale")
        rows, columns = self._empty.pop(name)
        self._expect(name, codes, (rows, columns if codes.shape[-1] == columns else columns // 2), file)
        self._expect(name + "_scale", scales, (rows,), file)
        weight = from_official(codes.to(self._device), scales.to(self._device), columns)
        if weight.bits <= self._bits < 16:
            self._place_quantized(name, weight)
        else:
            self._place(name, dequantize(weight, torch.float32))

    def _place_quantized(self, name: str, weight: QuantWeight) -> None:
        path = name.removesuffix(".weight")
        owner, _, child = path.rpartition(".")
        bias = self._network.get_submodule(path).bias
        setattr(self._network.get_submodule(owner), child, QuantLinear(weight, bias, self._ops))

    @staticmethod
    def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], file: Path) -> None:
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(
                f"{file} 里 {name} 的形状是 {list(tensor.shape)}，按 config.json 应为 {list(shape)}；"
                "config.json 和权重不是同一个模型的。",
                f"{name} in {file} has shape {list(tensor.shape)}, config.json asks for {list(shape)}: config.json and "
                "weights belong to different models.",
            )

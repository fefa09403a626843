"""A quantized network as one file beside the model that it was made of, which later starts map into memory.

A safetensors file: the layers' codes in the order in which the CPU's kernels read them, everything else as the network
has it. Its metadata say which files it was made of, and hold a sum over each tensor's bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn

from server.converted import VERSION, is_same, quantized_file
from server.converting import Sources, write
from server.kernels.cpu_ops import CpuOps
from server.kernels.cpu_weights import TiledWeight
from server.quant.linear import QuantLinear

_PARTS = ("codes", "scales", "row_scales")

Tensors = dict[str, torch.Tensor]


class Unusable(Exception):
    """The file is not what is needed; says why, as "it is ..."."""


class OfAnotherConfig(Unusable):
    """The file is right, and config.json describes another network."""

    def __init__(self) -> None:
        super().__init__("of another config.json")


class NetworkCache:
    """The file for one model folder and number of bits; ``files`` are the weights that the network is made of.

    ``stored_bits``: config.json's quantization_bit. Of its other fields only those count that decide which tensors
    there are, and of which shape: the rest may be changed. Where it is ``alone``, others of the files were deleted (see
    ``server.converted.kept``).
    """

    def __init__(
        self, folder: Path, bits: int, files: Sequence[Path], *, stored_bits: int | None = None, alone: bool = False
    ):
        self.path = quantized_file(folder, bits)
        self.files = files
        self.alone = alone
        self._stored_bits = stored_bits

    def save(self, network: nn.Module, others: Mapping[str, torch.Tensor], sources: Sources) -> None:
        """Write the file, whole or not at all; ``others`` are tensors that are not the network's.

        As ``converting.write``, which says what it raises.
        """
        tensors, linear = _taken_apart(network)
        tensors |= others
        size = sum(tensor.nbytes for tensor in tensors.values())
        aligned = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # all, when the largest come first
        said = {"linear": linear, "others": [*others], "stored_bits": self._stored_bits}
        write(self.path, aligned, size, sources, more={name: json.dumps(value) for name, value in said.items()})

    def load(self, network: nn.Module, ops: CpuOps) -> Tensors | None:
        """Fill an empty network from the file, which stays mapped; returns the other tensors.

        None where there is no file. Raises Unusable, the network still empty, where it is damaged or made of other
        files.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            problem = self._problem(metadata, tensors)
            if problem is None:
                return self._put_together(network, tensors, metadata, ops)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"damaged ({error})"
        raise Unusable(problem)

    def _problem(self, metadata: Mapping[str, Any], tensors: Tensors) -> str | None:
        if metadata["version"] != VERSION:
            return "of another version"
        recorded = {source["name"]: source for source in metadata["sources"]}
        names = {path.name for path in self.files}
        if not names <= recorded.keys() or (names != recorded.keys() and not self.alone):
            return "made of other files"
        for path in self.files:
            if not is_same(path, recorded[path.name]):
                return f"made of another {path.name}"
        return None if _sums(tensors) == metadata["sums"] else "damaged"

    def _put_together(
        self, network: nn.Module, tensors: Tensors, metadata: Mapping[str, Any], ops: CpuOps
    ) -> Tensors:
        """Takes what belongs to the network from ``tensors``; returns the rest. Raises OfAnotherConfig."""
        tensors, linear = dict(tensors), metadata["linear"]
        if metadata.get("stored_bits", self._stored_bits) != self._stored_bits:
            raise OfAnotherConfig
        wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        layers = {}
        for name, entry in linear.items():
            rows, columns = entry["shape"]
            if wanted.pop(f"{name}.weight", None) != (rows, columns):
                raise OfAnotherConfig
            table = None if entry["table"] is None else torch.tensor(entry["table"], dtype=torch.int8)
            codes, scales, row_scales = (tensors.pop(f"{name}.weight.{part}", None) for part in _PARTS)
            weight = TiledWeight(codes, scales, row_scales, table, columns, rows)
            layers[name] = QuantLinear(weight, network.get_submodule(name).bias, ops)
        others = {name: tensors.pop(name) for name in metadata.get("others", tensors.keys() - wanted.keys())}
        if wanted != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
            raise OfAnotherConfig
        # all is there: only now the network is changed
        for name, layer in layers.items():
            network.set_submodule(name, layer)
        for name, tensor in tensors.items():
            owner, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
        return others


def _sums(tensors: Tensors) -> dict[str, str]:
    """xxh3 of each tensor's bytes: it finds damage at the speed of the memory."""

    def one(tensor: torch.Tensor) -> str:
        return xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(one, tensors.values()), strict=True))


def _taken_apart(network: nn.Module) -> tuple[Tensors, dict[str, Any]]:
    """All tensors by name, and what else there is to say of the quantized layers."""
    tensors, linear = {}, {}
    for name, module in network.named_modules():
        if isinstance(module, QuantLinear):
            weight = module.weight
            table = None if weight.table is None else weight.table.tolist()
            linear[name] = {"shape": [weight.out_features, weight.in_features], "table": table}
            parts = {f"{name}.weight.{part}": getattr(weight, part) for part in _PARTS}
            tensors |= {part: tensor for part, tensor in parts.items() if tensor is not None}
    return tensors | {name: parameter.data for name, parameter in network.named_parameters()}, linear

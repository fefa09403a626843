"""A quantized network as one file beside the model that it was made of, which later starts map into memory.

A safetensors file: the layers' codes in the order in which the CPU's kernels read them, everything else as the network
has it. Its metadata say which files it was made of, and hold a sum over each tensor's bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from server.converted import SPARE_BYTES, VERSION, NoRoom, is_same, quantized_file, sha256, stamp, sync_folder
from server.kernels.cpu_ops import CpuOps
from server.kernels.cpu_weights import TiledWeight
from server.quant.linear import QuantLinear

_PARTS = ("codes", "scales", "row_scales")

Tensors = dict[str, torch.Tensor]


class Unusable(Exception):
    """The file is not what is needed; says why, as "it is ..."."""


class NetworkCache:
    """The file for one model folder and number of bits; ``files`` are the weights that the network is made of.

    Where it is ``alone``, others of them were deleted (see ``server.converted.kept``).
    """

    def __init__(self, folder: Path, bits: int, files: Sequence[Path], *, alone: bool = False):
        self.path = quantized_file(folder, bits)
        self.files = files
        self.alone = alone
        self._sources = [folder / "config.json", *files]
        self._hashing: dict[str, Any] = {}

    @contextlib.contextmanager
    def hashing(self) -> Iterator[None]:
        """Read the sources for ``save`` beside whoever reads them too, so that the disk is read once.

        What ends the block early ends this too: a program that gives up does not wait for gigabytes.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._hashing = {path.name: pool.submit(sha256, path) for path in self._sources}
        try:
            yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def save(self, network: nn.Module, others: Mapping[str, torch.Tensor]) -> None:
        """Write the file, whole or not at all; ``others`` are tensors that are not the network's.

        Within ``hashing``. Takes memory for one tensor. Raises NoRoom, or OSError where the folder cannot be written.
        """
        tensors, linear = _taken_apart(network)
        tensors |= others
        needed = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
        self.path.parent.mkdir(exist_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise NoRoom(needed, free)
        sources = [{**stamp(path), "sha256": self._hashing[path.name].result()} for path in self._sources]
        metadata = {"version": VERSION, "linear": linear, "sources": sources, "sums": _sums(tensors)}
        part = self.path.with_suffix(".part")
        try:
            save_file(tensors, part, {name: json.dumps(value) for name, value in metadata.items()})
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, self.path)
            sync_folder(self.path.parent)
        except (OSError, SafetensorError) as error:
            full = shutil.disk_usage(self.path.parent).free < SPARE_BYTES
            part.unlink(missing_ok=True)
            if full or getattr(error, "errno", None) == errno.ENOSPC:
                raise NoRoom(needed, free) from error
            raise OSError(str(error)) from error

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
                return _put_together(network, tensors, metadata["linear"], ops)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"damaged ({error})"
        raise Unusable(problem)

    def _problem(self, metadata: Mapping[str, Any], tensors: Tensors) -> str | None:
        if metadata["version"] != VERSION:
            return "of another version"
        recorded = {source["name"]: source for source in metadata["sources"]}
        names = {path.name for path in self._sources}
        if not names <= recorded.keys() or (names != recorded.keys() and not self.alone):
            return "made of other files"
        for path in self._sources:
            if not is_same(path, recorded[path.name]):
                return f"made of another {path.name}"
        return None if _sums(tensors) == metadata["sums"] else "damaged"


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


def _put_together(network: nn.Module, tensors: Tensors, linear: Mapping[str, Any], ops: CpuOps) -> Tensors:
    """Takes what belongs to the network from ``tensors``; returns the rest."""
    tensors, layers = dict(tensors), {}
    for name, entry in linear.items():
        rows, columns = entry["shape"]
        table = None if entry["table"] is None else torch.tensor(entry["table"], dtype=torch.int8)
        codes, scales, row_scales = (tensors.pop(f"{name}.weight.{part}", None) for part in _PARTS)
        weight = TiledWeight(codes, scales, row_scales, table, columns, rows)
        layers[name] = QuantLinear(weight, network.get_submodule(name).bias, ops)
    names = [name for name, _ in network.named_parameters() if name.removesuffix(".weight") not in layers]
    parameters = {name: nn.Parameter(tensors.pop(name), requires_grad=False) for name in names}
    # all is there: only now the network is changed
    for name, layer in layers.items():
        network.set_submodule(name, layer)
    for name, parameter in parameters.items():
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, parameter)
    return tensors

"""A checkpoint with stored results of another implementation, and ours loaded from it."""

import json
import os
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from server.engine.kv_cache import KVCache
from server.kernels.torch_ops import TorchOps
from server.models.base import ForwardBatch, Segment
from server.models.families import find_family
from server.models.files import read_json
from server.models.loader import load_network
from tests.oracle import ORACLE, ROOT

OWN = ROOT / "tests" / "data" / "reference"
DATA = Path(os.environ.get("DATA_DIR", ORACLE.parent / "data"))
FAMILY_NAMES = {"chatglm1": "chatglm"}


def reference_folders() -> list[Path]:
    """The repository's own references and the official ones, where those are there."""
    folders = [*OWN.glob("*"), *(ORACLE / "models").glob("*")]
    return sorted((f for f in folders if (f / "vectors.json").exists()), key=lambda f: f.name)


class Reference:
    """``network`` computes in float32 with ``bits`` as given; ``tensors`` and ``vectors`` are what it should give."""

    def __init__(self, folder: Path, bits: int = 16):
        self.folder = folder
        self.bits = bits
        self.vectors = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))
        self.config = read_json(folder / "config.json")
        name = self.vectors["meta"]["family"]
        self.family_name = FAMILY_NAMES.get(name, name)
        self.tolerance = 2e-4 if name == "chatglm1" else 1e-4

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "vectors.safetensors")

    @cached_property
    def loaded(self):
        family = find_family(self.config, self.folder, self.family_name)
        return load_network(
            self.folder, self.config, family, dtype=torch.float32, device="cpu", bits=self.bits, ops=TorchOps()
        )

    @property
    def network(self):
        return self.loaded[0]

    @property
    def prefix(self):
        return self.loaded[1]

    def conversation(self, rows: int = 1) -> "Conversation":
        return Conversation(self, rows)


class Conversation:
    """Sequences that grow together, each in a slot of its own of one cache."""

    def __init__(self, reference: Reference, rows: int):
        self._network = reference.network
        # the slots are not the rows, so that a mixed-up slot shows
        self._slots = list(range(rows, 0, -1))
        shape = self._network.kv_shape
        self._cache = KVCache(shape, rows + 1, 160, torch.float32, "cpu", reference.prefix)
        self.lengths = [0] * rows
        self._contexts = [None] * rows

    @torch.inference_mode()
    def feed(self, *rows: list[int]) -> list[torch.Tensor]:
        """Append ids to every row in one forward pass; logits [len(ids), vocab] of each."""
        if not any(self.lengths):
            self._contexts = [self._network.context(ids) for ids in rows]
        batch = ForwardBatch(
            torch.tensor([i for ids in rows for i in ids]),
            [Segment(self._slots[r], self.lengths[r], len(ids), self._contexts[r]) for r, ids in enumerate(rows)],
            torch.arange(sum(map(len, rows))),
        )
        logits = self._network.forward(batch, self._cache)
        self.lengths = [length + len(ids) for length, ids in zip(self.lengths, rows, strict=True)]
        return list(logits.split([len(ids) for ids in rows]))

    def greedy(self, *prompts: list[int], count: int, stop: frozenset[int] = frozenset()) -> list[list[int]]:
        """``count`` ids after each prompt, or up to and with a stop id."""
        answers = [[int(logits[-1].argmax())] for logits in self.feed(*prompts)]
        while len(answers[0]) < count and not (len(answers) == 1 and answers[0][-1] in stop):
            for answer, logits in zip(answers, self.feed(*([answer[-1]] for answer in answers)), strict=True):
                answer.append(int(logits[-1].argmax()))
        return answers

    def cached(self, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row, [layers, tokens, groups, head_dim] each."""
        shape, length = self._network.kv_shape, self.lengths[row]
        empty = torch.empty(0, shape.groups, shape.head_dim)
        nothing = Segment(self._slots[row], length, 0)
        layers = [self._cache.update(layer, nothing, empty, empty) for layer in range(shape.layers)]
        keys, values = zip(*layers, strict=True)
        return torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)


@cache
def load_reference(folder: Path, bits: int = 16) -> Reference:
    return Reference(folder, bits)

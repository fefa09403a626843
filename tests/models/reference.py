"""A checkpoint with stored results of another implementation, and ours loaded from it."""

import json
import os
import shutil
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from server.engine.kv_cache import KVCache
from server.kernels.torch_ops import TorchOps
from server.models.base import ForwardBatch, Segment
from server.models.families import AUTO, families, find_family
from server.models.files import read_json
from server.models.loader import load_network
from tests.oracle import ORACLE, ROOT

OWN = ROOT / "tests" / "data" / "reference"
TOKENIZERS = ROOT / "tests" / "data" / "tokenizers"
DATA = Path(os.environ.get("DATA_DIR", ORACLE.parent / "data"))
FAMILY_NAMES = {"chatglm1": "chatglm"}
GENERATIONS = {"chatglm": "ChatGLM-6B", "chatglm2": "ChatGLM2", "chatglm3": "ChatGLM3", "codegeex2": "CodeGeeX2"}


def complete_folder(name: str, target: Path) -> Path:
    """A copy of one of our small-* checkpoints with its tokenizer, as a user has it; returns the folder."""
    folder = target / name
    folder.mkdir(parents=True)
    for path in (OWN / name).iterdir():
        if not path.name.startswith("vectors."):
            shutil.copyfile(path, folder / path.name)
    first = "inner_hidden_size" in read_json(folder / "config.json")
    shutil.copy(TOKENIZERS / ("ice_text.model" if first else "tokenizer.model"), folder)
    return folder


def reference_folders(oracle: Path = ORACLE) -> list[Path]:
    """The repository's own references and the official ones, where those are there."""
    folders = [*OWN.glob("*"), *(oracle / "models").glob("*")]
    return sorted((f for f in folders if (f / "vectors.json").exists()), key=lambda f: f.name)


def _family_named(name: str) -> str:
    """The family whose name the given one begins with (chatglm3-32k), or else the one that the files look like."""
    name = FAMILY_NAMES.get(name, name)
    known = [family.name for family in families() if name.startswith(family.name)]
    return max(known, key=len, default=AUTO)


class Reference:
    """``network`` computes in ``dtype`` with ``bits`` as given; ``tensors`` and ``vectors`` are what it should give.

    An adapter's folder (meta.base names the model's folder beside it) is that model with the adapter.
    """

    def __init__(self, folder: Path, bits: int = 16, dtype: torch.dtype = torch.float32):
        self.folder = folder
        self.bits = bits
        self.dtype = dtype
        self.vectors = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))
        meta = self.vectors.get("meta", {})
        self.model = folder.parent / meta["base"] if "base" in meta else folder
        self.adapter = {meta["adapter"]: folder} if "adapter" in meta else {}
        self._family_name = _family_named(str(meta.get("family", AUTO)).lower())

    @cached_property
    def config(self) -> dict:
        own = self.folder / "config.json"
        return read_json(self.model / "config.json") | (read_json(own) if own.exists() else {})

    @cached_property
    def family(self):
        """The one that the folder names, or else what its files look like."""
        return find_family(self.config, self.model, self._family_name)

    @property
    def tolerance(self) -> float:
        """Of logits in float32: the first generation's large residuals cost digits."""
        return 2e-4 if self.family.name == "chatglm" else 1e-4

    @property
    def generation(self) -> str:
        name = GENERATIONS[self.family.name] + ("-32k" if self.config.get("rope_ratio", 1) != 1 else "")
        prefix = " P-tuning" if self.config.get("pre_seq_len") else ""
        return name + prefix + (" LoRA" if "lora" in self.adapter else "")

    @property
    def precision(self) -> str:
        """As written in ids of tests and in the table."""
        if self.dtype != torch.float32:
            return str(self.dtype).removeprefix("torch.")
        bits = self.config.get("quantization_bit")
        return f"official int{bits}" if bits else "float32"

    @cached_property
    def tensor_names(self) -> set[str]:
        if not (self.folder / "vectors.safetensors").exists():
            return set()
        with safe_open(self.folder / "vectors.safetensors", "pt") as file:
            return set(file.keys())

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "vectors.safetensors")

    @cached_property
    def loaded(self):
        options = {"dtype": self.dtype, "device": "cpu", "bits": self.bits, "ops": TorchOps(), **self.adapter}
        return load_network(self.model, read_json(self.model / "config.json"), self.family, **options)

    @property
    def network(self):
        return self.loaded[0]

    @property
    def prefix(self):
        return self.loaded[1]

    @cached_property
    def capacity(self) -> int:
        """Tokens of the longest sequence that anything in the folder asks for."""
        entries = [*self.vectors.get("cases", []), *(part for part in self.vectors.values() if isinstance(part, dict))]
        return max((_longest(entry) for entry in entries if "input_ids" in entry), default=1)

    def conversation(self, rows: int = 1) -> "Conversation":
        return Conversation(self, rows)


def greedy_ids(entry: dict) -> list | None:
    """The stored greedy answer (of a batch: one for each row), however many ids it has; None if there is none."""
    return next((ids for name, ids in entry.items() if name.startswith("greedy_") and isinstance(ids, list)), None)


def stopped_ids(entry: dict) -> list[int]:
    """The stored answer up to and with its end token."""
    return entry.get("output_ids_including_eos") or entry["generate_output_including_eos"]


def _longest(entry: dict) -> int:
    rows = entry["input_ids"] if isinstance(entry["input_ids"][0], list) else [entry["input_ids"]]
    answers = [greedy_ids(entry) or [], entry.get("decode_ids", []), entry.get("steps", [])]
    if "eos_token_id" in entry:
        answers.append(range(entry["max_new_tokens"]) if "max_new_tokens" in entry else stopped_ids(entry))
    answers += [answer for answer in answers[0] if isinstance(answer, list)]
    return max(map(len, rows)) + max(map(len, answers))


class Conversation:
    """Sequences that grow together, each in a slot of its own of one cache."""

    def __init__(self, reference: Reference, rows: int):
        self._network = reference.network
        # the slots are not the rows, so that a mixed-up slot shows
        self._slots = list(range(rows, 0, -1))
        shape = self._network.kv_shape
        self._cache = KVCache(shape, rows + 1, reference.capacity, reference.dtype, "cpu", reference.prefix)
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
        """Keys and values of one row, [layers, prefix + tokens, groups, head_dim] each."""
        shape, length = self._network.kv_shape, self.lengths[row]
        empty = torch.empty(0, shape.groups, shape.head_dim)
        nothing = Segment(self._slots[row], length, 0)
        layers = [self._cache.update(layer, nothing, empty, empty) for layer in range(shape.layers)]
        keys, values = zip(*layers, strict=True)
        return torch.stack(keys).transpose(1, 2), torch.stack(values).transpose(1, 2)


@cache
def load_reference(folder: Path, bits: int = 16, dtype: torch.dtype = torch.float32) -> Reference:
    return Reference(folder, bits, dtype)

"""Make the tiny checkpoints of tests/data/reference, their tokenizers and their expected results.

    .venv/bin/python -m tools.make_reference [NAME ...]       (needs tests/requirements.txt; deterministic)

A folder has the layout of an official checkpoint (config.json and weights under the official names), and beside it
vectors.safetensors and vectors.json, which tests/models/test_oracle.py reads. vectors.json names the judge:
transformers' GlmForCausalLM where it knows the model, else tools/plain_networks.py; both in float32, and neither shares
code with server/. LoRA adapters are made by peft.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.official_packing import pack_checkpoint, unpack_checkpoint
from tools.reference_checkpoints import SPECS, Spec, make_config, make_weights, quieten, stored_weights
from tools.reference_judges import GlmJudge, Judge, PlainJudge, add_lora, greedy
from tools.reference_tokenizers import Vocabulary, write_tokenizers

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
TARGET, TOKENIZERS = DATA / "reference", DATA / "tokenizers"
PREFIX_TENSORS = "transformer.prefix_encoder."
MARGIN = 2e-3  # between the best and the second logit of every greedy id
VARIED = 8  # different ids in each greedy answer
# of the tiny ones: one row, an odd chunk, and more rows than any block of a kernel is likely to have
LENGTHS = {"tiny": (1, 7, 67), "small": (5, 18)}
DECODED = {"tiny": 5, "small": 3}


class Reference:
    """One folder in the making."""

    def __init__(self, name: str, spec: Spec, seed: int):
        self.name, self.spec, self.seed = name, spec, seed
        self.kind = name.partition("-")[0]
        self.folder = TARGET / name
        self.first = spec.family == "chatglm"
        self.vocabulary = Vocabulary(TOKENIZERS, spec.family)
        self.config = make_config(spec, self.vocabulary.special if self.first else {})
        self.generator = torch.Generator().manual_seed(seed)
        self.stored, full = self._weights()
        plain = self.first or spec.bits < 16 or spec.lora or self.config.get("pre_seq_len")
        self.judge: Judge = (PlainJudge if plain else GlmJudge)(self.config, spec.family, full)
        if spec.lora:
            add_lora(self.judge, spec.lora, self.generator, self.folder)
        self.margin = float("inf")

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the folder holds, and what that means in float32 (with its base, where it has one)."""
        drawn = make_weights(self.config, self.spec.family, self.seed)
        if self.spec.base:
            own = {name: tensor for name, tensor in drawn.items() if name.startswith(PREFIX_TENSORS)}
            return own, stored_weights(TARGET / self.spec.base) | own
        if self.kind == "small":
            quieten(drawn, self.vocabulary.textless(self.config), 0.05)
            quieten(drawn, self.vocabulary.bytes, 0.7)
        if self.spec.bits == 16:
            return drawn, drawn
        embeddings = self.config.get("quantization_embeddings", False)
        packed = pack_checkpoint(drawn, self.spec.bits, embeddings=embeddings)
        return packed, unpack_checkpoint(packed, self.spec.bits)

    def ids(self, length: int, mask: str = "gmask_token_id") -> list[int]:
        """A prompt: any ids, or ChatGLM-6B's text, [gMASK] and <sop>."""
        if not self.first:
            return self._text(length)
        return [*self._text(length - 2), self.config[mask], self.config["bos_token_id"]]

    def _text(self, length: int) -> list[int]:
        low, high = self.vocabulary.text if self.kind == "small" else (3, self.config["padded_vocab_size"])
        return torch.randint(low, high, (length,), generator=self.generator).tolist()

    def greedy(self, ids: list[int], count: int) -> list[int]:
        answer, margin = greedy(self.judge, ids, count)
        self.margin = min(self.margin, margin)
        return answer

    def results(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The contents of vectors.json and vectors.safetensors; see tests/models/test_oracle.py."""
        meta = {
            "family": self.spec.family,
            "seed": self.seed,
            "source": f"{self.judge.source}, float32, tools/make_reference.py",
            "torch": torch.__version__,
        }
        if self.spec.base:
            meta |= {"base": self.spec.base, "adapter": "lora" if self.spec.lora else "ptuning"}
        tensors: dict[str, Tensor] = {}
        vectors: dict[str, Any] = {"meta": meta, "cases": []}
        for i, length in enumerate(LENGTHS[self.kind]):
            vectors["cases"].append(self._case(i, length, tensors))
        if not self.first:
            ids = vectors["cases"][-1]["input_ids"][:15]
            vectors["chunked"] = {"input_ids": ids, "chunks": [7, 5, 3]}
            tensors["chunked.logits"] = self.judge.logits(ids)
        vectors["eos_stop"] = eos_stop(vectors["cases"][1])
        if self.kind == "small":
            self._more(vectors, tensors)
        return vectors, tensors

    def _case(self, number: int, length: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        ids, decoded = self.ids(length), self._text(DECODED[self.kind])
        logits = self.judge.logits(ids + decoded)
        answer = self.greedy(ids, 32)
        results = {"prefill_logits": logits[:length], "decode_logits": logits[length:]}
        if not self.config.get("pre_seq_len"):
            keys, values = self.judge.cache(ids + decoded)
            results |= {"key_cache_after_decode": keys, "value_cache_after_decode": values}
        tensors |= {f"case{number}.{name}": tensor.clone() for name, tensor in results.items()}
        return {"name": f"case{number}", "input_ids": ids, "decode_ids": decoded, "greedy_32": answer}

    def _more(self, vectors: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        rows = [self.ids(length) for length in (3, 9, 6)]
        vectors["batch"] = {
            "input_ids": [[0] * (9 - len(ids)) + ids for ids in rows],
            "lengths": [len(ids) for ids in rows],
            "greedy_12": [self.greedy(ids, 12) for ids in rows],
        }
        if self.first:
            ids = self.ids(8, "mask_token_id")
            vectors["mask"] = {"input_ids": ids}
            tensors["mask.prefill_logits"] = self.judge.logits(ids)
        if self.config.get("pre_seq_len"):
            with torch.no_grad():
                keys, values = zip(*self.judge.network.prefixes(), strict=True)
            tensors |= {"prefix_key": torch.stack(keys), "prefix_value": torch.stack(values)}

    def write(self, vectors: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.spec.layout == "shards":
            write_shards(self.folder, self.stored)
        elif self.spec.base and not self.spec.lora:  # as the official training script leaves it
            torch.save(self.stored, self.folder / "pytorch_model.bin")
        elif not self.spec.lora:
            save_file(self.stored, self.folder / "model.safetensors", metadata={"format": "pt"})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / "vectors.safetensors")
        write_json(self.folder / "vectors.json", vectors)
        if not self.spec.lora:
            write_json(self.folder / "config.json", self.config)


def eos_stop(case: dict) -> dict:
    """The fifth greedy id declared an end token."""
    eos = case["greedy_32"][4]
    expected = case["greedy_32"][: case["greedy_32"].index(eos) + 1]
    return {"input_ids": case["input_ids"], "eos_token_id": [eos], "output_ids_including_eos": expected}


def write_shards(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Two files and an index, as transformers 4.30 wrote them."""
    names = list(weights)
    places: dict[str, str] = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def write_reference(name: str) -> None:
    """Draws weights until no greedy answer hangs on a rounding error, or is the same few ids again and again."""
    spec = SPECS[name]
    shutil.rmtree(TARGET / name, ignore_errors=True)
    for seed in itertools.count(spec.seed, 100):
        reference = Reference(name, spec, seed)
        vectors, tensors = reference.results()
        varied = min(len(set(case["greedy_32"])) for case in vectors["cases"])
        if reference.margin >= MARGIN and (varied >= VARIED or reference.kind == "tiny"):
            break
    reference.write(vectors, tensors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_tokenizers(TOKENIZERS)
    for name in sys.argv[1:] or SPECS:
        write_reference(name)
        print(TARGET / name)

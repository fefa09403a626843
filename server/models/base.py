"""What a model family offers to the engine, and what a network is given to compute on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from server.core import Message, Tool, ToolCall


class Context(NamedTuple):
    """The prompt of a prefix language model (ChatGLM-6B), whose tokens attend to each other in both directions."""

    length: int  # tokens in front of <sop>; the first segment holds them all
    mask: int  # index of the mask token that the answer stands for


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in a flat batch: tokens ``start`` .. ``start + length - 1`` of it."""

    slot: int  # the sequence's place in the KV cache
    start: int  # tokens of the sequence that are in the cache already
    length: int  # rows of the batch
    context: Context | None = None  # the sequence's own, what ``Network.context`` said of its prompt


@dataclass(frozen=True)
class ForwardBatch:
    """Sequences laid end to end, so that every linear layer reads its weights once for all of them.

    ``token_ids`` int64 [T], T = the sum of the segments' lengths; ``logit_rows`` int64 [R]: the rows whose logits are
    wanted.
    """

    token_ids: torch.Tensor
    segments: Sequence[Segment]
    logit_rows: torch.Tensor


class KVShape(NamedTuple):
    """What one token leaves in the cache: a key and a value [groups, head_dim] in each layer."""

    layers: int
    groups: int
    head_dim: int


class KVCache(Protocol):
    """Where keys and values of sequences live between steps.

    ``keys`` and ``values`` [layers, slots, groups, places, head_dim] are all of them: for networks whose layers are one
    call of the back end. A P-tuning prefix takes the first ``offset`` places of every slot.
    """

    keys: torch.Tensor
    values: torch.Tensor
    offset: int

    def update(
        self, layer: int, segment: Segment, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a segment's keys and values, each [length, groups, head_dim], keys already rotated.

        Returns all of that sequence's so far, each [groups, n, head_dim] with n >= start + length: a P-tuning prefix,
        if there is one, stands in front of the tokens.
        """


class Network(Protocol):
    """A decoder whose weights are loaded."""

    kv_shape: KVShape
    vocab_size: int
    max_positions: int  # the context length that it was trained for, in tokens

    def context(self, prompt_ids: Sequence[int]) -> Context | None:
        """What every segment of a sequence with this prompt has to carry; None for a causal network.

        Raises BadRequest for ids that are no prompt.
        """

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Logits float32 [R, vocab_size] of the wanted rows; the cache then holds all T tokens."""


class Tokenizer(Protocol):
    """sentencepiece with the family's special tokens, which are never parsed out of text."""

    vocab_size: int  # ids that stand for something; a network may have more rows

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special tokens."""

    def pieces(self, text: str) -> list[str]:
        """The pieces of the same ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """What one id stands for in UTF-8, maybe a part of a character; a piece's leading space is kept."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids as the official tokenizer's ``decode`` gives it; every incomplete byte is one U+FFFD."""


class Shown(NamedTuple):
    """What is certain of an answer that may call tools: grows at its end only, in both parts."""

    text: str
    calls: tuple[ToolCall, ...]


class Family(Protocol):
    """One generation: how to recognise it, read it, prompt it and show its answers."""

    name: str
    tokenizer_file: str  # in the model's folder
    causal_prompt: bool  # False: the prompt is attended in both directions (no prefix reuse, no chunks)
    takes_tools: bool  # whether it was trained to call tools; the methods for that are never called without

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        """Whether this checkpoint is of this family, from config.json and the files beside it."""

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """Raises ModelError naming the file that is missing or damaged."""

    def build_network(self, config: Mapping[str, Any], ops: Any) -> torch.nn.Module:
        """The empty network on the meta device; raises ModelError for a field that is missing or impossible."""

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of a text with special tokens, as the official tokenizer's call puts them; no template."""

    def build_prompt(
        self, tokenizer: Tokenizer, messages: Sequence[Message], answer_prefix: str = "", tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Token ids up to and with the answer prefix; raises BadRequest for roles that the family does not have."""

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the answer to these messages continues their text: nothing is stripped from it or replaced in it."""

    def call_openings(self, tokenizer: Tokenizer, names: Sequence[str]) -> list[list[int]]:
        """Ids, one list for each tool, that an answer begins with when it calls it; not behind an answer prefix."""

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids that end an answer and are not part of it."""

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        """The part of a raw answer that may be shown: post-processed as the official ``process_response`` does.

        While ``final`` is False, what a later token could still change is held back, so that every result is a
        prefix of the next. ``continued``: an answer prefix stands in front of ``text``, whose leading whitespace is
        then part of the answer.
        """

    def display_calls(self, text: str, names: Sequence[str], *, final: bool, continued: bool = False) -> Shown:
        """``display`` for an answer to which the tools ``names`` were offered: calls of them are taken out.

        A call is there once it is complete, and nothing of it is text before; one that turns out to be damaged, or was
        cut short, is text at its end.
        """


def token_embedding(rows: int, columns: int) -> nn.Embedding:
    """An embedding of weights [rows, columns] that are yet to be filled in.

    nn.Embedding's own constructor draws numbers, which on "meta" imports PyTorch's compiler: seconds of every start.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, columns, device="meta"))

"""A model small enough to reason about: what it answers depends on every token that its cache holds."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import torch

from server.engine.local import EngineSettings, LocalEngine
from server.models.base import ForwardBatch, KVShape

VOCAB = 128
EOS = 0


class HashNetwork:
    """Draws the next id from a hash of all ids in the sequence's slot, read back from the cache.

    A slot that is mixed up, half written or stale therefore changes the answer. ``script`` maps an id to what happens
    when it is read: an exception, a row of logits, or a threading.Event to wait for.
    """

    kv_shape = KVShape(layers=2, groups=1, head_dim=2)
    vocab_size = VOCAB

    def __init__(self, script=None):
        self.script = script or {}
        self.steps: list[list[int]] = []  # segment lengths of every step

    @property
    def rows_read(self) -> int:
        return sum(map(sum, self.steps))

    def context(self, prompt_ids):
        return None

    def forward(self, batch: ForwardBatch, cache) -> torch.Tensor:
        self.steps.append([s.length for s in batch.segments])
        rows, row = {}, 0
        wanted = set(batch.logit_rows.tolist())
        for segment in batch.segments:
            ids = batch.token_ids[row : row + segment.length]
            for length in range(1, segment.length + 1):
                if row + length - 1 in wanted or length == segment.length:
                    part = segment._replace(length=length)
                    rows[row + length - 1] = self._logits(ids[:length], part, cache)
            row += segment.length
        return torch.stack([rows[i] for i in batch.logit_rows.tolist()]) if len(batch.logit_rows) else torch.empty(0)

    def _logits(self, ids, segment, cache) -> torch.Tensor:
        for token in ids.tolist():
            effect = self.script.get(token)
            if isinstance(effect, Exception):
                raise effect
            if isinstance(effect, threading.Event):
                effect.wait(10)
            if isinstance(effect, torch.Tensor):
                return effect
        pair = ids.float().view(-1, 1, 1).expand(-1, 1, 2)
        keys, _ = cache.update(0, segment, pair, pair)
        _, values = cache.update(1, segment, pair + 1, pair + 2)
        history = keys[0, :, 0].tolist()
        consistent = values[0, :, 0].tolist() == [key + 2 for key in history]
        logits = torch.zeros(VOCAB)
        logits[next_id(history) if consistent else 1] = 10.0
        return logits


def next_id(history) -> int:
    """What HashNetwork answers after ``history``; never EOS."""
    value = 7
    for token in history:
        value = (value * 31 + int(token)) % 100003
    return 32 + value % (VOCAB - 32)


def expected(prompt_ids, count) -> list[int]:
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(next_id(ids))
    return ids[len(prompt_ids) :]


class AsciiTokenizer:
    """id = code point."""

    def encode(self, text):
        return [ord(c) for c in text]

    def pieces(self, text):
        return list(text)

    def decode(self, ids):
        return "".join(map(chr, ids))

    def token_bytes(self, token_id):
        return chr(token_id).encode()


class PlainFamily:
    """No template: contents joined with newlines."""

    name = "plain"
    causal_prompt = True
    takes_tools = False

    def encode(self, tokenizer, text):
        return tokenizer.encode(text)

    def build_prompt(self, tokenizer, messages, answer_prefix="", tools=()):
        return tokenizer.encode("\n".join(m.content for m in messages) + "\n" + answer_prefix)

    def continues(self, messages):
        return False

    def stop_ids(self, tokenizer):
        return frozenset({EOS})

    def display(self, text, *, final, continued=False):
        return text


def make_engine(network=None, *, family=None, causal_prompt=True, **settings) -> LocalEngine:
    family = family or PlainFamily()
    family.causal_prompt = causal_prompt
    model = SimpleNamespace(
        name="hash",
        family=family,
        tokenizer=AsciiTokenizer(),
        network=network or HashNetwork(),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device="cpu",
        prefix=None,
    )
    defaults = {"max_length": 256, "slots": 3, "queue": 4, "prefill_chunk": 8, "speculate": 0}
    return LocalEngine(model, EngineSettings(**{**defaults, **settings}))

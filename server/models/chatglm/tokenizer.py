"""The tokenizer of ChatGLM-6B: sentencepiece, with names for the whitespace that its normaliser would remove."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from server.models.files import load_sentencepiece
from server.models.pieces import piece_bytes, without_surrogates

_LONGEST_BLANK = 80
_SPACES = re.compile(f" {{2,{_LONGEST_BLANK}}}")
_BLANK = re.compile(r"<\|blank_(\d+)\|>")


class ChatGLMTokenizer:
    """See ``models.base.Tokenizer``; official file: tokenization_chatglm.py.

    Special tokens are pieces of the model; sentencepiece never finds them in text. ``decode`` leaves out ids that
    stand for nothing (official code: IndexError).
    """

    def __init__(self, sp: SentencePieceProcessor):
        self._sp = sp
        self._pad = sp.pad_id()
        self.vocab_size = sp.get_piece_size()
        self.gmask_id = sp.piece_to_id("[gMASK]")
        self.bos_id = sp.piece_to_id("<sop>")
        self.eos_id = sp.piece_to_id("<eop>")

    @classmethod
    def load(cls, path: Path) -> ChatGLMTokenizer:
        """Raises ModelError for a file that is missing or is no sentencepiece model."""
        return cls(load_sentencepiece(path))

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(_named_whitespace(text), out_type=int)

    def pieces(self, text: str) -> list[str]:
        return self._sp.encode(_named_whitespace(text), out_type=str)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or token_id == self._pad:
            return b""
        if token_id == self._sp.unk_id():
            return self._sp.decode([token_id]).encode()
        data = piece_bytes(self._sp, token_id)
        return _real_whitespace(data.decode()).encode() if data.startswith(b"<") else data

    def decode(self, ids: Sequence[int]) -> str:
        return _real_whitespace(self._sp.decode([i for i in ids if 0 <= i < self.vocab_size and i != self._pad]))


def _named_whitespace(text: str) -> str:
    text = without_surrogates(text).replace("\n", "<n>").replace("\t", "<|tab|>")
    return _SPACES.sub(lambda match: f"<|blank_{len(match[0])}|>", text)


def _real_whitespace(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return _BLANK.sub(lambda match: " " * int(match[1]), text)

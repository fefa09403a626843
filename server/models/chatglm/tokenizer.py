"""The tokenizer of ChatGLM-6B: sentencepiece, with names for the whitespace that its normaliser would remove."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from server.errors import ModelError
from server.models.chatglm.icetk import MISSING_PIECES
from server.models.files import damaged, load_sentencepiece
from server.models.pieces import piece_bytes, without_surrogates

_LONGEST_BLANK = 80
_SPACES = re.compile(f" {{2,{_LONGEST_BLANK}}}")
_BLANK = re.compile(r"<\|blank_(\d+)\|>")


class ChatGLMTokenizer:
    """See ``models.base.Tokenizer``; official file: tokenization_chatglm.py.

    Special tokens are pieces of the model; sentencepiece never finds them in text. ``image_tokens`` ids, which stand
    for no text, come before the pieces. ``decode`` leaves out ids that stand for nothing (official code: IndexError).
    """

    def __init__(self, sp: SentencePieceProcessor, image_tokens: int = 0):
        self._sp = sp
        self._offset = image_tokens
        self._num_pieces = sp.get_piece_size()
        self._pad = sp.pad_id()
        self.vocab_size = image_tokens + self._num_pieces
        self.gmask_id = image_tokens + sp.piece_to_id("[gMASK]")
        self.bos_id = image_tokens + sp.piece_to_id("<sop>")
        self.eos_id = image_tokens + sp.piece_to_id("<eop>")

    @classmethod
    def load(cls, path: Path, bos_id: int | None = None) -> ChatGLMTokenizer:
        """``bos_id``: the model's id of <sop>, which tells how many image tokens it has; None for no image tokens.

        Raises ModelError for a file that is missing, or is no tokenizer of this model.
        """
        sp = load_sentencepiece(path)
        if _lacks(sp, "<n>"):
            raise damaged(path, "不是 ChatGLM-6B 的分词模型（没有 <n>）", "is not ChatGLM-6B's: it has no <n>")
        if _lacks(sp, "<sop>"):
            sp = load_sentencepiece(path, MISSING_PIECES)
        image_tokens = 0 if bos_id is None else bos_id - sp.piece_to_id("<sop>")
        if image_tokens < 0:
            raise ModelError(
                f"config.json 的 bos_token_id 是 {bos_id}，{path} 里的 <sop> 却是 {bos_id - image_tokens}；"
                "两个文件不是同一个模型的，请重新下载它们。",
                f"bos_token_id in config.json is {bos_id}, but <sop> in {path} is {bos_id - image_tokens}: they belong "
                "to different models, download both again.",
                param="bos_token_id",
            )
        return cls(sp, image_tokens)

    def encode(self, text: str) -> list[int]:
        return [self._offset + piece for piece in self._sp.encode(_named_whitespace(text), out_type=int)]

    def pieces(self, text: str) -> list[str]:
        return self._sp.encode(_named_whitespace(text), out_type=str)

    def token_bytes(self, token_id: int) -> bytes:
        piece = token_id - self._offset
        if not self._says_something(piece):
            return b""
        if piece == self._sp.unk_id():
            return self._sp.decode([piece]).encode()
        data = piece_bytes(self._sp, piece)
        return _real_whitespace(data.decode()).encode() if data.startswith(b"<") else data

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (token_id - self._offset for token_id in ids)
        return _real_whitespace(self._sp.decode([piece for piece in pieces if self._says_something(piece)]))

    def _says_something(self, piece: int) -> bool:
        return 0 <= piece < self._num_pieces and piece != self._pad


def _lacks(sp: SentencePieceProcessor, piece: str) -> bool:
    return sp.piece_to_id(piece) == sp.unk_id()


def _named_whitespace(text: str) -> str:
    text = without_surrogates(text).replace("\n", "<n>").replace("\t", "<|tab|>")
    return _SPACES.sub(lambda match: f"<|blank_{len(match[0])}|>", text)


def _real_whitespace(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return _BLANK.sub(lambda match: " " * int(match[1]), text)

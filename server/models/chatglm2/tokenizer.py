"""The tokenizer of ChatGLM2, CodeGeeX2 and ChatGLM3: sentencepiece, and special tokens behind its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from server.models.files import load_sentencepiece
from server.models.pieces import piece_bytes, without_surrogates

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


class ChatGLM2Tokenizer:
    """See ``models.base.Tokenizer``; official file: tokenization_chatglm.py.

    ``special_ids`` maps the special tokens to their ids, which begin where the pieces end. They are never found in
    text: "[gMASK]" or "<|user|>" typed by somebody are ordinary pieces. ``decode`` leaves them out, or writes them
    literally where ``shows_special`` (ChatGLM3). Ids that stand for nothing are left out (official code: IndexError).
    """

    def __init__(self, sp: SentencePieceProcessor, special_tokens: Sequence[str], *, shows_special: bool):
        self._sp = sp
        self._num_pieces = sp.get_piece_size()
        self._literal = dict(enumerate(special_tokens, self._num_pieces)) if shows_special else {}
        self._silent = {sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()}
        self.special_ids = {token: self._num_pieces + i for i, token in enumerate(special_tokens)}
        self.eos_id = sp.eos_id()
        self.vocab_size = self._num_pieces + len(special_tokens)

    @classmethod
    def load(cls, path: Path, special_tokens: Sequence[str], *, shows_special: bool) -> ChatGLM2Tokenizer:
        """Raises ModelError for a file that is missing or is no sentencepiece model."""
        return cls(load_sentencepiece(path), special_tokens, shows_special=shows_special)

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(without_surrogates(text), out_type=int)

    def pieces(self, text: str) -> list[str]:
        return self._sp.encode(without_surrogates(text), out_type=str)

    def token_bytes(self, token_id: int) -> bytes:
        if 0 <= token_id < self._num_pieces:
            return b"" if token_id in self._silent else piece_bytes(self._sp, token_id)
        return self._literal.get(token_id, "").encode()

    def decode(self, ids: Sequence[int]) -> str:
        return self._sp.decode_pieces([piece for piece in map(self._piece, ids) if piece])

    def _piece(self, token_id: int) -> str:
        if 0 <= token_id < self._num_pieces:
            return "" if token_id in self._silent else self._sp.id_to_piece(token_id)
        return self._literal.get(token_id, "")

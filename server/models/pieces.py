"""Between text and sentencepiece's pieces."""

from __future__ import annotations

from sentencepiece import SentencePieceProcessor


def without_surrogates(text: str) -> str:
    """JSON can carry half of a surrogate pair, which is no character and cannot be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def piece_bytes(sp: SentencePieceProcessor, token_id: int) -> bytes:
    """UTF-8 of one piece; a byte piece stands for that byte, maybe a part of a character, a control piece for none."""
    piece = sp.id_to_piece(token_id)
    if sp.is_byte(token_id):
        return bytes([int(piece[3:5], 16)])  # <0xE4>
    return b"" if sp.is_control(token_id) else piece.replace("\u2581", " ").encode()

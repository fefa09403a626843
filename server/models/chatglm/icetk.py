"""What the first ``ice_text.model`` lacks, that of the package icetk with 130000 pieces.

Until April 2023 the official tokenization_chatglm.py appended these pieces whenever it loaded the file; the files of
later releases hold them. Field numbers are those of sentencepiece_model.proto (google/sentencepiece).
"""

from __future__ import annotations

from collections.abc import Iterator

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_LONGEST_BLANK = 80


def _pieces() -> Iterator[tuple[str, int]]:
    yield from ((token, _CONTROL) for token in _SPECIAL)
    yield "<|tab|>", _USER_DEFINED
    yield from ((f"<|blank_{length}|>", _USER_DEFINED) for length in range(2, _LONGEST_BLANK + 1))
    yield from ((f"<0x{byte:02X}>", _BYTE) for byte in range(256))


def _message(field: int, content: bytes) -> bytes:
    """A nested message of less than 128 bytes."""
    return bytes([field << 3 | 2, len(content)]) + content


def _piece(text: str, kind: int) -> bytes:
    """ModelProto.pieces: piece = 1, score = 2 (a float, 0), type = 3."""
    return _message(1, _message(1, text.encode()) + b"\x15\0\0\0\0" + bytes([3 << 3, kind]))


# ModelProto.trainer_spec = 2 is merged with the file's: byte_fallback = 35
MISSING_PIECES = b"".join(_piece(*piece) for piece in _pieces()) + _message(2, b"\x98\x02\x01")

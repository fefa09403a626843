"""Tiny tokenizers with the settings and the order of ids of the official files: those are 1 and 2.7 MB.

``tokenizer.model`` of ChatGLM2, ChatGLM3 and CodeGeeX2; ``ice_text.model`` of ChatGLM-6B.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

TEXTS = (
    "[Round 1]\n\n问：你好\n\n答：你好！我是一个很小的语言模型。\n\n[Round 2]\n\n问：今天天气怎么样？\n\n答：",
    "[Round 0]\n问：你是谁？\n答：我不知道，请再问一次。\n[Round 1]\n问：北京有什么好玩的地方？\n答：",
    "Hello, who are you? I am a small language model, and the answer is here.",
    "The weather is fine today: it rains in the north and the sun shines in the south.",
    "# language: Python\ndef add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i)\n",
    "人工智能和语言模型可以写文章，也可以回答问题。中文和英文都可以，大家一起来学习。",
)
MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
# types of pieces in sentencepiece_model.proto
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6


def write_tokenizers(folder: Path) -> None:
    """``tokenizer.model`` and ``ice_text.model``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    (folder / "ice_text.model").write_bytes(ice_text_model())


def tokenizer_model() -> bytes:
    """BPE; <unk>, <s>, </s>, 256 bytes, then pieces. The special tokens are no pieces: their ids begin behind."""
    return train(
        model_type="bpe",
        vocab_size=440,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def ice_text_model() -> bytes:
    """Unigram; <unk>, <s>, </s>, <pad>, <n>, pieces, and at the end what the official file has there."""
    trained = train(
        model_type="unigram",
        vocab_size=220,
        character_coverage=0.98,
        pad_id=3,
        user_defined_symbols=["<n>"],
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
    )
    blanks = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    last = [*((piece, CONTROL) for piece in MASKS), *((piece, USER_DEFINED) for piece in blanks)]
    last += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    # a message's fields may follow each other in any order: repeated ones grow, and submessages merge
    trainer_spec = field(2, varint(35 << 3) + varint(1))  # byte_fallback = true
    return trained + b"".join(field(1, piece_message(*piece)) for piece in last) + trainer_spec


def train(**options) -> bytes:
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n") if line]),
        model_writer=writer,
        split_digits=True,
        add_dummy_prefix=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return writer.getvalue()


def piece_message(piece: str, kind: int) -> bytes:
    """ModelProto.SentencePiece with score 0."""
    return field(1, piece.encode()) + varint(2 << 3 | 5) + bytes(4) + varint(3 << 3) + varint(kind)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


class Vocabulary:
    """Which ids of a family's tokenizer in ``folder`` stand for what."""

    def __init__(self, folder: Path, family: str):
        first = family == "chatglm"
        file = folder / ("ice_text.model" if first else "tokenizer.model")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        ids = range(processor.get_piece_size())
        self._size = len(ids)
        self._control = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
        self.bytes = [i for i in ids if processor.is_byte(i)]
        # ids that may be drawn as text: from the first one to the last one and one more
        self.text = (5, processor.piece_to_id("[MASK]")) if first else (3, self._size)
        names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]"}
        self.special = {f"{name}_token_id": processor.piece_to_id(piece) for name, piece in names.items()}

    def textless(self, config: Mapping[str, Any]) -> list[int]:
        """Control pieces, special tokens behind the pieces, and the matrices' padding."""
        rows = config.get("padded_vocab_size", config.get("vocab_size"))
        return [*self._control, *range(self._size, rows)]

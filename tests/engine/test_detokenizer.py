"""Streaming text against the whole text, on a real byte-fallback sentencepiece model."""

import io

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from server.core import GenerationRequest, Message, SamplingParams
from server.engine.answer import AnswerText
from server.engine.detokenizer import StreamingDetokenizer
from server.engine.prompting import Prompt
from tests.engine.doubles import AsciiTokenizer, PlainFamily

TEXTS = [
    "Hello world, this is fine.",
    "你好👋！我是 AI 助手。",
    "family: 👨‍👩‍👧‍👦 done",
    "𝒳 + 𠮷 = ?",
    "  two spaces\n\n\ttab ",
    "é̂ combining",
    "\x00\x01 control",
]


class Pieces:
    def __init__(self):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world this is", "你好 我是 助手 hello fine done"] * 20),
            model_writer=model,
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def encode(self, text):
        return self._sp.encode(text)

    def decode(self, ids):
        return self._sp.decode(list(ids))


@pytest.fixture(scope="module")
def tokenizer():
    return Pieces()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_pieces_add_up_and_no_half_character_comes_out(tokenizer, text, step):
    detokenizer, ids = StreamingDetokenizer(tokenizer), tokenizer.encode(text)
    parts = [detokenizer.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + detokenizer.flush() == text == tokenizer.decode(ids)


@pytest.mark.parametrize("cut", [1, 3, 6, 10])
def test_an_answer_prefix_keeps_the_space_that_follows_it(tokenizer, cut):
    ids = tokenizer.encode("hello world this is fine")
    detokenizer = StreamingDetokenizer(tokenizer, ids[cut - 1 : cut])
    text = "".join(detokenizer.add([i]) for i in ids[cut:]) + detokenizer.flush()
    assert tokenizer.decode(ids[:cut]) + text == "hello world this is fine"


def test_an_unfinished_character_at_the_end_is_left_out(tokenizer):
    ids = tokenizer.encode("ok 👋")
    detokenizer = StreamingDetokenizer(tokenizer)
    assert "".join(detokenizer.add([i]) for i in ids[:-2]) + detokenizer.flush() == "ok "


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(tokenizer):
    broken = [tokenizer._sp.piece_to_id("<0x80>")] * 12
    detokenizer = StreamingDetokenizer(tokenizer)
    text = "".join(detokenizer.add([i]) for i in [*broken, *tokenizer.encode("hello")]) + detokenizer.flush()
    assert text.endswith("hello") and set(text.strip("\ufffd")) <= set(" hello")


def test_stop_string_that_spans_tokens(tokenizer):
    request = GenerationRequest(messages=(Message("user", "?"),), params=SamplingParams(stop=("我是 助",)))
    answer = AnswerText(PlainFamily(), tokenizer, request, Prompt([], continued=False))
    parts = []
    for token in tokenizer.encode("hello 你好 我是 助手 world"):
        parts.append(answer.add(token))
        if answer.stopped:
            break
    assert "".join(parts) + answer.flush() == "hello 你好 "
    assert answer.stopped


@given(text=st.text("ab ", max_size=30), stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_an_answer_as_soon_as_one_is_complete(text, stops):
    request = GenerationRequest(messages=(Message("user", "?"),), params=SamplingParams(stop=tuple(stops)))
    answer = AnswerText(PlainFamily(), AsciiTokenizer(), request, Prompt([], continued=False))
    streamed = ""
    for character in text:
        streamed += answer.add(ord(character))
        if answer.stopped:
            break
    read = next((text[:end] for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)), None)
    wanted = text if read is None else read[: min(read.find(stop) for stop in stops if stop in read)]
    assert streamed + answer.flush() == wanted
    assert answer.stopped == (read is not None)

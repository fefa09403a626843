"""The texts of the demo model, and that THUDM/demo was made from them."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import demo_data  # noqa: E402  (tools is not a package)

DEMO = ROOT / "THUDM" / "demo"
LARGEST_DEMO = 6_000_000  # bytes, so that it can live in the repository and in every bundle

needs_demo = pytest.mark.skipif(not (DEMO / "tokenizer.model").exists(), reason="THUDM/demo is not trained")


@pytest.fixture(scope="module")
def entries():
    return demo_data.load_entries()


@pytest.fixture(scope="module")
def tokenizer():
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_proto=(DEMO / "tokenizer.model").read_bytes())


def test_there_are_about_a_hundred_entries_in_both_languages(entries):
    answers = [entry.dialogues[0][0].answer for entry in entries if entry.source != demo_data.FALLBACK]
    chinese = sum(map(demo_data.is_chinese, answers))
    assert len(answers) >= 100
    assert chinese >= 50 and len(answers) - chinese >= 50


def test_entries_have_several_wordings(entries):
    for entry in entries:
        assert len(entry.dialogues[0][0].questions) >= 2 or entry.source == demo_data.FALLBACK, entry.dialogues[0]


def test_at_least_twelve_dialogues_have_several_rounds(entries):
    assert sum(len(entry.dialogues[0]) > 1 for entry in entries) >= 12


def test_no_first_question_has_two_answers(entries):
    answers: dict[str, str] = {}
    for entry in entries:
        for first, *_ in entry.dialogues:
            for question in first.questions:
                assert answers.setdefault(demo_data.normalized(question), first.answer) == first.answer, question


def test_no_follow_up_has_two_answers_in_one_dialogue(entries):
    for entry in entries:
        for _, *later in entry.dialogues:
            questions = [demo_data.normalized(question) for turn in later for question in turn.questions]
            assert len(questions) == len(set(questions)), questions


def test_some_follow_up_depends_on_the_history(entries):
    answers: dict[str, set[str]] = {}
    for entry in entries:
        for turn in entry.dialogues[0][1:]:
            for question in turn.questions:
                answers.setdefault(demo_data.normalized(question), set()).add(turn.answer)
    assert sum(len(different) > 1 for different in answers.values()) >= 5


def test_words_are_filled_in(entries):
    for text in demo_data.all_texts(entries):
        assert "{1}" not in text and "{2}" not in text and "{3}" not in text


def test_the_model_says_that_it_is_only_a_demo(entries):
    answers = {demo_data.normalized(question): first.answer
               for entry in entries for first, *_ in entry.dialogues for question in first.questions}
    assert "演示" in answers["你好"] and "演示" in answers["你是谁"]
    assert "demo" in answers["hello"] and "demo" in answers["whoareyou"]


@pytest.mark.parametrize("text", ["问：没有回答\n", "答：没有问题\n", "Q: two\nA: one\nA: two\n", "neither\n"])
def test_a_malformed_entry_is_refused(tmp_path, text):
    (tmp_path / "zh.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"zh\.txt"):
        demo_data.load_entries(tmp_path)


@needs_demo
def test_the_model_folder_is_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= LARGEST_DEMO


@needs_demo
def test_the_tokenizer_round_trips_all_texts(entries, tokenizer):
    for text in demo_data.all_texts(entries):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_id() not in ids


@needs_demo
def test_the_special_tokens_fit_behind_the_pieces(tokenizer):
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.get_piece_size() + 5 <= config["padded_vocab_size"]
    assert config["padded_vocab_size"] % 64 == 0
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)

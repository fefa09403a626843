"""docile-chatty's way of reading /generate, with the axios of today."""

import itertools
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clients.conftest import ADMITTED
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.functional.live import serve

sys.path.insert(0, str(ROOT / "tools"))

import demo_data  # tools is not a package

ANSWERS = 200
ENDLESS = {"query": "你好", "repetition_penalty": 0.05, "temperature": 0}


@pytest.fixture
def ask(node):
    """What docile-chatty sees of each answer: ``texts`` of its events, ``broken`` chunks, an ``error`` or None."""
    return lambda port, *asked: node("docile_chatty.js", "ask", f"http://127.0.0.1:{port}", asked, ADMITTED)


def questions():
    """All kinds, with and without a prefix and a history; greedy, so that each has one answer."""
    rng = random.Random(0)
    dialogues = [d for entry in demo_data.load_entries() for d in entry.dialogues if "{" not in d[0].questions[0]]
    prefixes = ["", "", *demo_data.load_openers()]
    for _ in range(ANSWERS):
        *earlier, (asked, *_) = rng.sample(dialogues, rng.choice([1, 1, 2, 4]))
        yield {
            "query": rng.choice(asked.questions),
            "answer_prefix": rng.choice(prefixes),
            "max_length": 4096,
            "top_p": 0.7,
            "temperature": 0,
            "history": [[first.questions[0], first.answer] for first, *_ in earlier],
        }


def test_200_answers_come_whole(program, ask):
    asked = list(questions())
    with ThreadPoolExecutor(ADMITTED) as pool:
        whole = list(pool.map(lambda fields: program.ask(**fields), asked))
    answers = ask(program.port, *asked)
    assert len(answers) == ANSWERS
    for fields, answer, text in zip(asked, answers, whole, strict=True):
        assert (answer["error"], answer["broken"]) == (None, [])
        assert answer["texts"][-1] == text and answer["texts"][0].startswith(fields["answer_prefix"])
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(answer["texts"]))
    assert sum(len(answer["texts"]) > 3 for answer in answers) > ANSWERS / 2  # they did come bit by bit


def test_interrupt_without_a_body_ends_the_answer_with_what_it_has(program, ask):
    ended = program.text.count("tokens/s, abort")
    (answer,) = ask(program.port, {**ENDLESS, "interruptAfter": 5})
    assert (answer["error"], answer["broken"]) == (None, [])
    assert len(answer["texts"]) >= 5 and answer["texts"][-1].startswith(answer["texts"][4])
    program.wait_for(rf"(?s)(tokens/s, abort.*){{{ended + 1}}}")


def test_a_long_silence_of_the_model_is_bridged(ask):
    with serve(FakeEngine(5.5, "慢", "慢来")) as port:
        (answer,) = ask(port, {"query": "q", "answer_prefix": "我"})
    assert (answer["error"], answer["broken"]) == (None, [])
    assert answer["texts"][0] == "我" and answer["texts"][-1] == "我慢慢来"

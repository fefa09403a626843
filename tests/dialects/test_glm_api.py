"""GLM-API's dialect, byte by byte."""

import pytest

from server.core import Message, Overflow, Tokenization
from tests.dialects import recorded
from tests.dialects.recorded import client_of, engine_for
from tests.fake_engine import FakeEngine


@pytest.mark.parametrize("path", recorded.requests("glm_api"), ids=lambda path: path.stem)
def test_bytes(path, unpaced):
    kind = "delta" if "delta" in path.stem else "cumulative"
    assert recorded.send(client_of(engine_for(path.stem), glm_api_stream=kind), path) == recorded.expected(path)


@pytest.mark.parametrize("path", ["/chat", "/chat-stream"])
def test_request_to_the_engine(path):
    engine = FakeEngine(max_length=3000)
    client = client_of(engine)
    client.post(path, json={"prompt": "q", "history": None, "max_length": None}, buffered=True)
    client.post(path, json={"prompt": "q", "history": [["a", "b"]], "max_length": "9", "top_p": 0, "temperature": "0"})
    default, given = engine.requests
    assert default.messages == (Message("user", "q"),)
    assert given.messages == (Message("user", "a"), Message("assistant", "b"), Message("user", "q"))
    assert (default.overflow, default.client) == (Overflow.DROP_OLDEST, "127.0.0.1")
    assert [default.params.max_length, default.params.top_p, default.params.temperature] == [3000, 0.7, 0.95]
    assert [given.params.max_length, given.params.top_p, given.params.temperature] == [9, 0, 0]


@pytest.mark.parametrize("path", ["/chat", "/chat-stream"])
def test_default_max_length(path):
    engine = FakeEngine(max_length=32768)
    client_of(engine).post(path, json={"prompt": "q"})
    assert engine.requests[0].params.max_length == 4096


@pytest.mark.parametrize("path", ["/chat", "/chat-stream"])
def test_answers_carry_the_request_id(path):
    assert client_of(FakeEngine("a")).post(path, json={"prompt": "q"}).headers["X-Request-Id"] == "request-1"


class Tokenizer(FakeEngine):
    """A text of ten tokens; the special tokens stand in front, as in ChatGLM2, or behind, as in ChatGLM-6B."""

    def __init__(self, in_front, behind):
        super().__init__()
        self.in_front, self.behind = in_front, behind

    def tokenize(self, text):
        ids = tuple(range(10)) if text else ()
        return Tokenization(ids, tuple("abcdefghij"[: len(ids)]), (*self.in_front, *ids, *self.behind))


@pytest.mark.parametrize(
    ("in_front", "behind", "prompt", "max_length", "expected"),
    [
        ((64790, 64792), (), "x", 12, [64790, 64792, *range(10)]),
        ((64790, 64792), (), "x", 11, [64790, 64792, *range(9)]),
        ((64790, 64792), (), "x", 2, [64790, 64792]),
        ((), (130001, 130004), "x", 12, [*range(10), 130001, 130004]),
        ((), (130001, 130004), "x", 11, [*range(9), 130001, 130004]),
        ((), (130001, 130004), "x", 3, [0, 130001, 130004]),
        ((), (130001, 130004), "x", 1, [130001]),
        ((), (130001, 130004), "", 4096, [130001, 130004]),
        ((64790, 64792), (), "", 1, [64790]),
    ],
)
def test_truncation_keeps_the_special_tokens(in_front, behind, prompt, max_length, expected):
    client = client_of(Tokenizer(in_front, behind))
    answer = client.post("/tokenize", json={"prompt": prompt, "max_length": max_length}).json
    assert answer["tokenIds"] == expected
    assert answer["tokens"] == list("abcdefghij" if prompt else "")


def test_number_of_texts():
    client = client_of(FakeEngine(), language="en")
    assert len(client.post("/embedding", json={"prompt": ["x"] * 2048}).json["data"]) == 2048
    refused = client.post("/embedding", json={"prompt": ["x"] * 2049})
    assert (refused.status_code, refused.json["object"]) == (400, "error")
    assert refused.json["message"] == "prompt has 2049 elements; at most 2048 are allowed."


def test_tokenize_cuts_at_4096_unless_told_otherwise():
    client = client_of(FakeEngine(max_length=100))
    assert len(client.post("/tokenize", json={"prompt": "a " * 5000}).json["tokenIds"]) == 4096
    assert len(client.post("/tokenize", json={"prompt": "a " * 5000, "max_length": 9999}).json["tokenIds"]) == 5002

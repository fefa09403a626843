"""ChatGLM-web-stream-demo's dialect, byte by byte."""

import logging

import pytest

from server.core import Overflow, SamplingParams
from tests.dialects import recorded
from tests.dialects.recorded import client_of, engine_for
from tests.fake_engine import FakeEngine


@pytest.mark.parametrize("path", recorded.requests("web_stream"), ids=lambda path: path.stem)
def test_bytes(path, unpaced):
    assert recorded.send(client_of(engine_for(path.stem)), path) == recorded.expected(path)


@pytest.mark.parametrize("path", ["/chat", "/stream"])
def test_the_model_is_shown_the_last_five_rounds(path):
    engine = FakeEngine()
    history = [[f"q{i}", f"a{i}"] for i in range(8)]
    client_of(engine).post(path, json={"query": "q", "history": history})
    (request,) = engine.requests
    shown = [text for turn in history[3:] for text in turn] + ["q"]
    assert [message.content for message in request.messages] == shown
    assert [message.role for message in request.messages] == ["user", "assistant"] * 5 + ["user"]


@pytest.mark.parametrize("path", ["/chat", "/stream"])
def test_the_models_own_defaults(path):
    engine = FakeEngine()
    response = client_of(engine).post(path, json={"query": "q", "history": []})
    (request,) = engine.requests
    assert request.params == SamplingParams()
    assert (request.overflow, request.client) == (Overflow.DROP_OLDEST, "127.0.0.1")
    assert response.headers["X-Request-Id"] == "request-1"


def test_get_with_query_parameters():
    answer = client_of(FakeEngine("a")).get("/chat", query_string={"query": "q", "history": '[["1", "2"]]'}).json
    assert answer == {"query": "q", "response": "a", "history": [["1", "2"], ["q", "a"]], "success": True}


def test_an_answer_that_comes_with_its_end_is_still_sent_as_a_delta():
    """The page of the original shows the deltas, and not what the finished event has beside them."""
    body = client_of(FakeEngine("whole")).post("/stream", json={"query": "q", "history": []}).data.decode()
    assert body.count('"delta": "whole"') == 1 and body.count('"finished": true') == 1
    assert body.index('"delta": "whole"') < body.index('"delta": "[EOS]"')


def test_clear_frees_caches():
    engine = FakeEngine()
    client = client_of(engine)
    client.get("/clear")
    client.post("/clear", json={})
    assert engine.freed == 2
    client.head("/clear")
    assert engine.freed == 2


def test_score_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        assert client_of(FakeEngine()).get("/score?score=-3").status_code == 200
    assert "score -3 from 127.0.0.1" in caplog.text

"""A page made for ChatGLM-web-stream-demo, reading with @microsoft/fetch-event-source."""

import pytest

from server.errors import GenerationFailed
from tests.fake_engine import FakeEngine
from tests.functional.live import serve

QUERIES = ["你好", "你是谁？", "What is int8?"]


@pytest.fixture
def page(node):
    """``page(port, function, *args)`` calls a function of the page's script."""
    return lambda port, function, *args: node("web_stream.js", function, f"http://127.0.0.1:{port}", *args)


def test_a_conversation(program, page):
    history = []
    for query, events in zip(QUERIES, page(program.port, "converse", QUERIES), strict=True):
        assert {event["event"] for event in events} == {"delta"} and len(events) > 3
        *growing, last = [event["data"] for event in events]
        history.append([query, last["response"]])
        assert last == {
            "query": query,
            "delta": "[EOS]",
            "response": "".join(event["delta"] for event in growing),
            "history": history,
            "finished": True,
        }
        so_far = ""
        for event in growing:
            so_far += event["delta"]
            assert (event["response"], event["finished"]) == (so_far, False)


def test_chat_clear_and_score(program, page):
    status, answer = page(program.port, "ask", "/chat", {"query": "谢谢", "history": [["你好", "你好！"]]}).values()
    assert status == 200 and answer["success"] is True and answer["response"]
    assert answer["history"] == [["你好", "你好！"], ["谢谢", answer["response"]]]
    for path in ("/clear", "/score?score=5"):
        assert page(program.port, "ask", path) == {"status": 200, "body": {"success": True}}
    program.wait_for("score 5 from 127.0.0.1")


def test_only_the_last_five_rounds_are_shown_to_the_model_and_all_come_back(page):
    history = [[str(i), str(-i)] for i in range(8)]
    engine = FakeEngine("好")
    with serve(engine) as port:
        events = page(port, "stream", {"query": "q", "history": history})
    assert events[-1]["data"]["history"] == [*history, ["q", "好"]]
    (asked,) = engine.requests
    assert [message.content for message in asked.messages] == [t for round_ in history[3:] for t in round_] + ["q"]


def test_failures(page):
    engine = FakeEngine("半", GenerationFailed("显存不足。", "Out of memory."))
    with serve(engine) as port:
        *_, last = page(port, "stream", {"query": "q", "history": []})
        refused = page(port, "ask", "/chat", {"query": "q", "history": 5})
    assert last["data"]["finished"] and last["data"]["history"] == [["q", "半"]]
    assert (last["data"]["success"], last["data"]["message"]) == (False, "显存不足。")
    assert refused["status"] == 400 and refused["body"]["success"] is False and "history" in refused["body"]["message"]

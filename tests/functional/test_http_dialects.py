"""The streams of the older protocols over a real server: an event a write, keep-alive, clients that leave."""

import json
import threading

import pytest

from server.api.streaming import Answer
from server.errors import GenerationFailed
from tests.fake_engine import FakeEngine
from tests.functional.live import Streaming, request, serve, wait_for

STREAMS = {
    "/chat-stream": {"prompt": "q"},
    "/stream": {"query": "q", "history": []},
}


def event_of(chunk: bytes) -> dict:
    """The data of a chunk that holds one event and nothing else."""
    head, separator, rest = chunk.partition(b"data: ")
    assert separator and head in (b"", b"event: delta\n")
    assert rest.endswith(b"\n\n") and rest.count(b"\n") == 2
    return json.loads(rest)


def events_of(client: Streaming) -> list[dict]:
    client.read_all()
    return [event_of(chunk) for chunk in client.chunks()]


@pytest.fixture
def no_repeats(monkeypatch):
    """However slow the machine."""
    monkeypatch.setitem(Answer.deltas.__kwdefaults__, "repeat", 60)


def words_one_by_one(path: str, **settings) -> list[dict]:
    """The events of an answer whose next word is said when the one before has come to the client."""
    said, going_on = ("你", "好 ", "😀"), [threading.Event() for _ in range(3)]
    script = [step for pair in zip(said, going_on, strict=True) for step in pair]
    with serve(FakeEngine(*script), **settings) as port, Streaming(port, path, **STREAMS[path]) as client:
        for word, go_on in zip(said, going_on, strict=True):
            client.read_until(word.encode())
            go_on.set()
        return events_of(client)


def test_glm_api_writes_one_cumulative_event_at_a_time(no_repeats):
    events = words_one_by_one("/chat-stream")
    assert [event["content"] for event in events] == ["", "你", "你好 ", "你好 😀", "你好 😀"]
    assert [event["completion_tokens"] for event in events] == [0, 1, 1, 2, 2]


def test_glm_api_writes_one_delta_at_a_time(no_repeats):
    events = words_one_by_one("/chat-stream", glm_api_stream="delta")
    assert [event["content"] for event in events] == ["", "你", "好 ", "😀", ""]
    assert [event["completion_tokens"] for event in events] == [0, 1, 1, 2, 2]


def test_web_stream_writes_one_delta_at_a_time_and_an_end(no_repeats):
    *events, end = words_one_by_one("/stream")
    assert [(event["delta"], event["response"]) for event in events] == [
        ("", ""),
        ("你", "你"),
        ("好 ", "你好 "),
        ("😀", "你好 😀"),
    ]
    assert not any(event["finished"] for event in events) and end["finished"]
    assert (end["delta"], end["response"]) == ("[EOS]", "你好 😀") and end["history"] == [["q", "你好 😀"]]


def test_keep_alive_repeats_the_answer_so_far():
    go_on = threading.Event()
    with serve(FakeEngine("a", go_on, "b")) as port:
        clients = [Streaming(port, path, **fields) for path, fields in STREAMS.items()]
        for client, mark in zip(clients, (b'"content": "a"', b'"response": "a"'), strict=True):
            while client.received.count(mark) < 2:
                assert client._read()
        go_on.set()
        glm_api, web_stream = map(events_of, clients)
        for client in clients:
            client.socket.close()
    assert [event["content"] for event in glm_api].count("a") >= 2 and glm_api[-1]["content"] == "ab"
    assert "".join(event["delta"] for event in web_stream) == "ab[EOS]" and web_stream[-1]["response"] == "ab"


@pytest.mark.parametrize("said", [(), ("half",)], ids=["waiting", "answering"])
@pytest.mark.parametrize("path", STREAMS)
def test_a_client_that_leaves_stops_its_stream(path, said):
    engine = FakeEngine(*said, threading.Event())
    with serve(engine) as port:
        with Streaming(port, path, **STREAMS[path]) as client:
            client.read_until(said[0].encode() if said else b"\n\n")
            assert not engine.streams[0].closed.is_set()
        wait_for(engine.streams[0].closed.is_set)


@pytest.mark.parametrize("path", ["/chat", "/"])
def test_a_client_that_leaves_stops_its_whole_answer(path):
    engine = FakeEngine("half", threading.Event())
    with serve(engine) as port:
        with Streaming(port, path, prompt="q"):
            wait_for(lambda: engine.streams)
        wait_for(engine.streams[0].closed.is_set)


def test_interrupted_streams_end_as_usual():
    engine = FakeEngine("half", threading.Event())
    with serve(engine) as port:
        clients = [Streaming(port, path, **fields) for path, fields in STREAMS.items()]
        for client in clients:
            client.read_until(b"half")
        request(port, path="/interrupt")
        glm_api, web_stream = (events_of(client)[-1] for client in clients)
        for client in clients:
            client.socket.close()
    assert (glm_api["content"], glm_api["object"]) == ("half", "chat.completion")
    assert (web_stream["history"], web_stream["finished"]) == ([["q", "half"]], True) and "success" not in web_stream


def test_interrupted_answers_have_what_there_is():
    engine = FakeEngine("half", threading.Event())
    with serve(engine) as port, Streaming(port, "/", prompt="q") as client:
        wait_for(lambda: engine.streams and len(engine.streams[0]._steps) == 1)
        request(port, path="/interrupt")
        assert b'{"response": "half", "history": [["q", "half"]], "status": 200' in client.read_until(b"}")


@pytest.mark.parametrize("path", STREAMS)
def test_a_failure_on_the_way_is_the_last_event(path):
    engine = FakeEngine("半", GenerationFailed("显存不足。", "Out of memory."))
    with serve(engine, language="en") as port, Streaming(port, path, **STREAMS[path]) as client:
        *_, last = events_of(client)
    assert last["message"] == "Out of memory."
    assert last.get("object", "error") == "error" and last.get("success", False) is False


class SlowEmbedder(FakeEngine):
    def __init__(self, *script):
        super().__init__(*script)
        self.asked, self.go_on = threading.Event(), threading.Event()

    def embed(self, texts, gone):
        self.asked.set()
        assert self.go_on.wait(20)
        return super().embed(texts, gone)


def test_answers_go_on_while_texts_are_embedded():
    engine = SlowEmbedder("a", "b")
    with serve(engine) as port, Streaming(port, "/embedding", prompt=["x", "yy"]) as embedding:
        assert engine.asked.wait(20)
        with Streaming(port, "/chat-stream", prompt="q") as chat:
            assert events_of(chat)[-1]["content"] == "ab"
        assert request(port, "GET", "/clear")[2] == b'{"success": true}'
        engine.go_on.set()
        body = embedding.read_until(b"}").partition(b"\r\n\r\n")[2]
    assert [vector[0] for vector in json.loads(body)["data"]] == [1.0, 2.0]


def test_an_oversized_body_is_refused_in_the_dialects_own_shape():
    """By waitress, before the application sees it."""
    with serve(FakeEngine(), max_body_bytes=1000, language="en") as port:
        for path, key in (("/embedding", "object"), ("/clear", "response"), ("/generate", "success")):
            status, _, body = request(port, path=path, body=b" " * 100_000)
            assert status == 413 and key in json.loads(body) and "limit" in json.loads(body)["message"]

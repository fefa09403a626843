"""Streams over a real server: pacing, keep-alive, clients that leave, interruption under full load."""

import itertools
import json
import threading
import time

import pytest

from server.api.chatlog import open_chat_log
from server.api.streaming import PACE, REPEAT, Answer
from server.core import GenerationRequest
from server.errors import GenerationFailed
from tests.fake_engine import FakeEngine
from tests.functional.live import Streaming, request, serve, wait_for


def text_of(event: bytes) -> str:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
    return json.loads(event[6:])["response"]


def last_text(client: Streaming) -> str:
    client.read_all()
    return text_of(client.chunks()[-1])


def test_first_event_comes_before_the_first_token():
    first_token = threading.Event()
    with (
        serve(FakeEngine(first_token, "好")) as port,
        Streaming(port, query="q", answer_prefix="你", stream=True) as client,
    ):
        head = client.read_until(b"\n\n")
        assert b"X-Request-Id: request-1\r\n" in head and b"Content-Type: text/event-stream" in head
        assert not first_token.is_set()
        first_token.set()
        client.read_all()
        texts = [text_of(chunk) for chunk in client.chunks()]
        assert texts[0] == "你" and texts[-1] == "你好"


def test_every_chunk_is_one_event_and_the_last_one_has_it_all():
    words = ["字" * 5, 0.004] * 25
    together = reads = 0
    with serve(FakeEngine(*words)) as port:
        for _ in range(10):
            with Streaming(port, query="q", stream=True) as client:
                client.read_all()
                texts = [text_of(chunk) for chunk in client.chunks()]
                assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
                assert texts[0] == "" and texts[-1] == "字" * 125
                assert max(map(len, client.chunks())) < 65536
                # how docile-chatty reads: what one recv brings is one event
                reads += len(client.reads)
                together += sum(data.count(b"data: ") > 1 for _, data in client.reads)
    assert together < reads / 4  # none on a quiet machine


def test_version_1_streams_the_history_too():
    with serve(FakeEngine("你", 0.03, "好")) as port:
        with Streaming(port, "/stream", query="q", history=[["a", "b"]], top_p=0.5) as client:
            client.read_all()
        last = json.loads(client.chunks()[-1][6:])
        assert last == ["你好", [["a", "b"], ["q", "你好"]]]


def deltas_and_times(*script, **timing):
    stream = FakeEngine(*script).submit(GenerationRequest())
    answer = Answer(stream, lambda: False, lambda answer: None)
    return [(delta, time.perf_counter()) for delta in answer.deltas(**timing)]


def test_events_keep_their_distance():
    got = deltas_and_times(*["x", 0.003] * 60)
    assert "".join(delta for delta, _ in got) == "x" * 60
    times = [when for _, when in got]
    assert all(later - earlier >= PACE for earlier, later in itertools.pairwise(times))
    assert len(got) < 60


def test_the_last_event_keeps_its_distance_though_nothing_is_new():
    got = deltas_and_times(0.05, "a")
    assert [delta for delta, _ in got] in (["", "a", ""], ["", "a"])
    assert got[-1][1] - got[-2][1] >= PACE


def test_news_after_a_pause_goes_out_at_once():
    begin = time.perf_counter()
    got = deltas_and_times(0.3, "a", 0.3, "b")
    assert [delta for delta, _ in got][:2] == ["", "a"]
    assert 0.3 <= got[1][1] - begin < 0.55  # the second word would come at 0.6


def test_repeats_while_there_is_nothing_new():
    got = deltas_and_times("a", 0.5, "b", 0.5, repeat=0.1)
    assert [delta for delta, _ in got].count("") >= 4
    assert "".join(delta for delta, _ in got) == "ab"


def test_keep_alive_over_the_wire_repeats_the_last_event():
    assert REPEAT < 2
    with serve(FakeEngine("a", REPEAT + 1.0, "b")) as port, Streaming(port, query="q", stream=True) as client:
        client.read_all()
        texts = [text_of(chunk) for chunk in client.chunks()]
        assert texts.count("a") >= 2 and texts[-1] == "ab"


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}], ids=["stream", "plain"])
@pytest.mark.parametrize("script", [(), ("a",)], ids=["waiting", "answering"])
def test_a_client_that_leaves_stops_its_generation(fields, script, tmp_path):
    never = threading.Event()
    engine = FakeEngine(*script, never)
    chat_log = open_chat_log(tmp_path / "chat.log")
    with serve(engine, chat_log=chat_log) as port:
        with Streaming(port, query="q", **fields) as client:
            wait_for(lambda: engine.streams)
            if fields["stream"]:
                client.read_until(b"".join(word.encode() for word in script) + b'"}\n\n')
        wait_for(engine.streams[0].closed.is_set)
        wait_for(lambda: (tmp_path / "chat.log").read_text("utf-8"))
    chat_log.close()
    assert json.loads((tmp_path / "chat.log").read_text("utf-8"))["finish_reason"] == "abort"


def test_interrupt_answers_at_once_while_every_place_is_taken():
    never = threading.Event()
    engine = FakeEngine("half", never, capacity=6)
    with serve(engine) as port:
        clients = [Streaming(port, query="q", stream=True) for _ in range(6)]
        for client in clients:
            client.read_until(b"half")
        status, headers, body = request(port, body={"query": "one too many", "stream": True})
        assert (status, headers["Retry-After"]) == (503, "3") and json.loads(body)["success"] is False
        status, _, body = request(port, path="/interrupt")
        assert (status, body) == (200, b'{"message": "OK", "success": true}')
        for client in clients:
            assert client.read_all().endswith(b"0\r\n\r\n")
            assert text_of(client.chunks()[-1]) == "half"
            client.socket.close()
        assert request(port, "GET", "/")[0] == 200


def test_interrupt_stops_a_plain_answer_with_what_it_has():
    engine = FakeEngine("half", threading.Event())
    with serve(engine) as port, Streaming(port, query="q") as client:
        wait_for(lambda: engine.streams)
        wait_for(lambda: len(engine.streams[0]._steps) == 1)
        request(port, path="/interrupt")
        assert client.read_until(b"half").startswith(b"HTTP/1.1 200 OK")


def test_interrupt_leaves_other_peoples_answers_alone():
    engine = FakeEngine("half", go_on := threading.Event(), " whole")
    with (
        serve(engine) as port,
        Streaming(port, query="q", stream=True) as mine,
        Streaming(port, source="127.0.0.2", query="q", stream=True) as other,
        Streaming(port, source="127.0.0.3", query="q", stream=True) as named,
    ):
        for client in (mine, other, named):
            client.read_until(b"half")
        request(port, path="/interrupt")
        assert last_text(mine) == "half"
        wanted = named.received.split(b"X-Request-Id: ")[1].split(b"\r\n")[0].decode()
        request(port, path="/interrupt", body={"id": wanted})
        assert last_text(named) == "half"
        go_on.set()
        assert last_text(other) == "half whole"


def test_bad_requests_beside_a_stream_do_not_disturb_it():
    engine = FakeEngine(*["字", 0.01] * 60)
    bad = [b"{", b'{"history": 5}', b"\xff", b'{"top_p": 1e999}', b"[" * 99999, b'{"max_length": 0}', b"[]"]
    with serve(engine) as port, Streaming(port, query="q", stream=True) as client:
        threads = [
            threading.Thread(target=lambda: [request(port, body=body) for body in bad]),
            threading.Thread(target=lambda: [request(port, "PUT", "/nowhere") for _ in bad]),
        ]
        for thread in threads:
            thread.start()
        client.read_all()
        for thread in threads:
            thread.join()
        assert text_of(client.chunks()[-1]) == "字" * 60


def test_a_failed_generation_says_so_and_the_next_one_works():
    engine = FakeEngine("半", GenerationFailed("显存不足。", "Out of memory."))
    with serve(engine, language="en") as port:
        for _ in range(2):
            with Streaming(port, query="q", stream=True) as client:
                client.read_all()
                last = json.loads(client.chunks()[-1][6:])
                assert last == {"response": "半", "message": "Out of memory.", "success": False}


def test_closing_the_engine_ends_the_streams_in_an_orderly_way():
    engine = FakeEngine("half", threading.Event())
    with serve(engine) as port:
        client = Streaming(port, query="q", stream=True)
        client.read_until(b"half")
    assert client.read_all().endswith(b"0\r\n\r\n")
    client.socket.close()

"""Clients that stop reading without closing: nobody else waits for them, and after a time they are dropped."""

import contextlib
import itertools
import json
import socket
import threading
import time

import psutil
import pytest

from server.api import wsgi
from tests.fake_engine import FakeEngine
from tests.functional.live import TIMEOUT, Streaming, request, serve, wait_for
from tests.functional.program import Program
from tests.functional.test_serve import ENDLESS

WORDS = ("字", 0.03) * 30
# my-chatglm2's /stream repeats the history in every event, so that a few of them fill all buffers
LONG = {"query": "q", "history": [["问" * 300_000, "答"]], "top_p": 0.5}
CHAT = {"messages": [{"role": "user", "content": "q"}], "stream": True}


class Stalled(Streaming):
    """Asks and does not read; its receive buffer is as small as the system lets it be."""

    def connect(self, port, source):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.settimeout(TIMEOUT)
        client.connect(("127.0.0.1", port))
        return client

    def is_connected(self) -> bool:
        """Whether the server, which runs in this process, holds the connection."""
        mine = self.socket.getsockname()
        return any(connection.raddr == mine for connection in psutil.Process().net_connections("tcp4"))

    def wait_until_dropped(self) -> None:
        wait_for(self.is_connected)
        wait_for(lambda: not self.is_connected())


@pytest.fixture
def stalled():
    """Opens such clients; they are closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **fields: stack.enter_context(Stalled(*args, **fields))


def test_others_are_answered_however_many_have_stalled(stalled, monkeypatch):
    monkeypatch.setattr(wsgi, "SPARE_THREADS", 2)
    engine = FakeEngine(*WORDS, capacity=3)
    with serve(engine) as port:
        for _ in range(3):  # six are more than there are threads
            engine.streams.clear()
            stalled(port, "/stream", **LONG)
            stalled(port, "/stream", **LONG)
            wait_for(lambda: len(engine.streams) == 2)
            assert request(port, body={"query": "q"})[2] == ("字" * 30).encode()
            wait_for(lambda: not engine._running)


def test_a_slow_client_gets_fewer_events_and_all_of_the_text(stalled):
    engine = FakeEngine(*WORDS)
    with serve(engine) as port:
        client = stalled(port, "/stream", **LONG)
        wait_for(lambda: engine.streams and not engine._running)
        client.read_all()
    texts = [json.loads(chunk[6:])[0] for chunk in client.chunks()]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == "字" * 30 and len(texts) < 25


def test_a_slow_client_of_deltas_misses_none(stalled):
    engine = FakeEngine(*("字" * 30_000, 0.03) * 20)
    with serve(engine) as port:
        client = stalled(port, "/stream", query="q", history=[])
        wait_for(lambda: engine.streams and not engine._running)
        client.read_all()
    *events, last = [json.loads(chunk.partition(b"data: ")[2]) for chunk in client.chunks()]
    assert "".join(event["delta"] for event in events) == last["response"] == "字" * 600_000
    assert last["finished"] and len(events) < 15


@pytest.mark.parametrize(
    ("path", "fields", "script"),
    [
        pytest.param("/stream", LONG, WORDS, id="skipping events"),
        pytest.param("/v1/chat/completions", CHAT, ("字" * 1_000_000, 0.01) * 8, id="waiting for room"),
    ],
)
def test_one_that_takes_nothing_for_long_is_dropped_and_its_answer_ends(stalled, monkeypatch, path, fields, script):
    monkeypatch.setattr(wsgi, "STALL_SECONDS", 0.5)
    engine = FakeEngine(*script, threading.Event())
    with serve(engine) as port:
        client = stalled(port, path, **fields)
        client.wait_until_dropped()
        wait_for(engine.streams[0].closed.is_set)


def test_so_is_one_that_leaves_the_end_of_a_finished_answer(stalled, monkeypatch):
    monkeypatch.setattr(wsgi, "STALL_SECONDS", 0.5)
    with serve(FakeEngine("字" * 5_000_000)) as port:
        stalled(port, "/generate", query="q", stream=True).wait_until_dropped()


def test_waiting_for_a_slow_model_is_not_stalling(monkeypatch):
    monkeypatch.setattr(wsgi, "STALL_SECONDS", 1.5)
    with serve(FakeEngine(3.0, "字" * 5_000_000)) as port:
        assert request(port, body={"query": "q"})[2] == ("字" * 5_000_000).encode()


def test_reading_slowly_is_not_stalling(stalled, monkeypatch):
    monkeypatch.setattr(wsgi, "STALL_SECONDS", 3)
    with serve(FakeEngine("字" * 5_000_000)) as port:
        client = stalled(port, "/generate", query="q", stream=True)
        for _ in range(8):
            time.sleep(0.5)
            taken = 0
            while taken < 1 << 20:
                taken += len(client.socket.recv(1 << 20))
        assert client.is_connected()


def test_the_program_with_all_slots_but_one_stalled(stalled):
    with Program("--slots", "3", "--queue", "0", "--max-length", "2048") as program:
        fields = {**ENDLESS, "query": "你好", "max_length": 2048, "history": [["问" * 50_000, "答"]]}
        for _ in range(2):
            stalled(program.port, "/stream", **fields).read_until(b"200 OK")
        answer = program.ask("你好")
        assert "演示" in answer
        assert list(program.events("你好"))[-1]["response"] == answer
        program.post("/interrupt", b"").read()
        program.wait_for(r"(?s)(tokens/s, abort.*){2}")
        assert [program.ask("你好") for _ in range(3)] == [answer] * 3
        assert program.stop() == 0
        assert "Traceback" not in program.text

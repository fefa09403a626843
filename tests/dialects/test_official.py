"""The dialect of the official api.py, byte by byte."""

from datetime import datetime

import pytest

from server.api.dialects import official
from server.core import Message, Overflow
from tests.dialects import recorded
from tests.dialects.recorded import client_of, engine_for
from tests.fake_engine import FakeEngine


class FixedTime(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2023, 7, 1, 9, 5, 3, 999999)


@pytest.mark.parametrize("path", recorded.requests("official"), ids=lambda path: path.stem)
def test_bytes(path, monkeypatch):
    monkeypatch.setattr(official, "datetime", FixedTime)
    assert recorded.send(client_of(engine_for(path.stem)), path) == recorded.expected(path)


def test_the_time_is_the_local_time_now():
    before = datetime.now().replace(microsecond=0)
    said = client_of(FakeEngine("a")).post("/", json={"prompt": "q"}).json["time"]
    assert before <= datetime.strptime(said, "%Y-%m-%d %H:%M:%S") <= datetime.now()


def test_request_to_the_engine():
    engine = FakeEngine(max_length=1500)
    client = client_of(engine)
    client.post("/", json={"prompt": "q", "history": None, "temperature": None})
    client.post("/", json={"prompt": "q", "history": [["a", "b"]], "max_length": "9", "top_p": "0.1", "temperature": 0})
    default, given = engine.requests
    assert default.messages == (Message("user", "q"),)
    assert given.messages == (Message("user", "a"), Message("assistant", "b"), Message("user", "q"))
    assert (default.overflow, default.client) == (Overflow.DROP_OLDEST, "127.0.0.1")
    assert [default.params.max_length, default.params.top_p, default.params.temperature] == [1500, 0.7, 0.95]
    assert [given.params.max_length, given.params.top_p, given.params.temperature] == [9, 0.1, 0]


def test_default_max_length():
    engine = FakeEngine(max_length=8192)
    client_of(engine).post("/", json={"prompt": "q"})
    assert engine.requests[0].params.max_length == 2048


def test_it_shares_its_path_with_the_page():
    client = client_of(FakeEngine("a"))
    assert client.get("/").json == {"message": "Server started", "success": True}
    response = client.post("/", json={"prompt": "q"}, headers={"Accept": "text/html"})
    assert response.json["response"] == "a" and response.headers["X-Request-Id"] == "request-1"

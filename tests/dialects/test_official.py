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


def asked(**fields):
    engine = FakeEngine(max_length=1500)
    response = client_of(engine).post("/", json={"prompt": "x = 1", **fields})
    return engine.requests[0], response.json


def settings(request):
    params = request.params
    return [params.max_length, params.top_p, params.top_k, params.temperature]


@pytest.mark.parametrize("lang", ["Python", "python", "PYTHON"])
def test_a_languages_tag_stands_in_front_of_the_prompt(lang):
    request, answer = asked(lang=lang)
    assert request.messages == (Message("user", "# language: Python\nx = 1"),)
    assert answer["lang"] == lang and answer["history"][0][0] == "# language: Python\nx = 1"


@pytest.mark.parametrize("lang", ["Python", "None"])
def test_with_a_language_the_defaults_are_codegeex2s(lang):
    """Those of its demo/fastapicpu.py, whose clients send "None" for no tag."""
    request, answer = asked(lang=lang)
    assert settings(request) == [128, 0.95, 0, 0.2]
    assert request.overflow is Overflow.REFUSE
    assert answer["lang"] == lang
    assert request.messages[0].content.endswith("x = 1")
    given, _ = asked(lang=lang, max_length=2000, top_p=0.5, top_k="7", temperature=None)
    assert settings(given) == [1500, 0.5, 7, 0.2]


@pytest.mark.parametrize("lang", [None, ""])
def test_without_a_language_nothing_changes(lang):
    (request, answer), (plain, _) = asked(lang=lang, top_k=3), asked()
    assert request == plain and "lang" not in answer


@pytest.mark.parametrize(
    ("lang", "names"),
    [("pyton", ["Python"]), ("c+", ["C++"]), ("Visual-Basi", ["Visual Basic"]), ("火星语", ["Python", "Go"])],
)
def test_unknown_languages_are_refused_with_near_ones(lang, names):
    client = client_of(FakeEngine("a"))
    for language in ("zh", "en"):
        response = client.post("/", json={"prompt": "x", "lang": lang}, headers={"Accept-Language": language})
        assert response.status_code == response.json["status"] == 400
        assert lang in response.json["message"] and "None" in response.json["message"]
        assert all(name in response.json["message"] for name in names)


def test_every_spelling_that_the_document_lists_is_known():
    listed = official.ChatFields.model_json_schema()["properties"]["lang"]["enum"]
    assert len(listed) > 150
    for lang in listed:
        assert official.ChatFields(prompt="x", lang=lang).lang == lang


def test_it_shares_its_path_with_the_page():
    client = client_of(FakeEngine("a"))
    assert client.get("/").json == {"message": "Server started", "success": True}
    response = client.post("/", json={"prompt": "q"}, headers={"Accept": "text/html"})
    assert response.json["response"] == "a" and response.headers["X-Request-Id"] == "request-1"

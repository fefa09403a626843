"""Recorded exchanges: data/<dialect>/NAME.request is answered with exactly NAME.response.

A request is a line ``POST /path HTTP/1.1`` and headers, a blank line, the body; a response its status line and
Content-Type, a blank line, the body.
"""

from pathlib import Path

from server.api.app import create_app
from server.api.dialect import ApiSettings
from server.errors import ContextOverflow, GenerationFailed, Overloaded, Unavailable
from tests.fake_engine import FakeEngine

DATA = Path(__file__).parent / "data"

ANSWER = ("你", "好\n", '😀"')
FAILURE = GenerationFailed("显存不足。", "Out of memory.")
REFUSALS = {
    "too_long": ContextOverflow("问题有 9000 个词元，最多 1638 个。", "The query has 9000 tokens; 1638 are allowed."),
    "overloaded": Overloaded("服务器已满。", "The server is full.", retry_after=7),
    "unavailable": Unavailable("没有向量模型。", "There is no sentence model."),
}


def engine_for(name: str) -> FakeEngine:
    """An engine that gives ANSWER, breaks an answer off or refuses every request, as a recording's name says."""
    engine = FakeEngine("半", FAILURE) if "failure" in name else FakeEngine(*ANSWER)
    engine.refuse = next((error for word, error in REFUSALS.items() if word in name), None)
    return engine


def client_of(engine: FakeEngine, **settings):
    return create_app(engine, ApiSettings(**settings)).test_client()


def requests(dialect: str) -> list[Path]:
    """The dialect's recorded requests; fails if one lacks its response, or a response its request."""
    found = sorted((DATA / dialect).glob("*.request"))
    assert found and {p.stem for p in found} == {p.stem for p in (DATA / dialect).glob("*.response")}
    return found


def send(client, path: Path) -> bytes:
    """What the application answers to a recorded request, in the form of a recorded response."""
    head, _, body = path.read_bytes().partition(b"\n\n")
    line, *headers = head.decode().split("\n")
    method, target, *_ = line.split(" ")
    response = client.open(target, method=method, data=body, headers=[header.split(": ", 1) for header in headers])
    return f"{response.status}\nContent-Type: {response.content_type}\n\n".encode() + response.data


def expected(path: Path) -> bytes:
    return path.with_suffix(".response").read_bytes()

"""Recorded exchanges: data/<dialect>/NAME.request is answered with exactly NAME.response.

A request is a line ``POST /path HTTP/1.1`` and headers, a blank line, the body; a response its status line and
Content-Type, a blank line, the body.
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"


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

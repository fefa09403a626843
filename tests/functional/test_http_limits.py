"""What waitress sees before the application does: bodies over the limit, malformed HTTP, many connections."""

import json
import socket

import pytest

from tests.fake_engine import FakeEngine
from tests.functional.live import TIMEOUT, request, serve

MIB = 1 << 20
TOO_LARGE = {"message": "The body is larger than the limit of 8 MiB.", "success": False}
ENGLISH = {"Accept-Language": "en"}


@pytest.fixture(scope="module")
def port():
    with serve(FakeEngine("a")) as port:
        yield port


def exchange(port, *parts: bytes) -> bytes:
    """Send all parts, then read to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        for part in parts:
            sock.sendall(part)
        return read_to_end(sock)


def read_to_end(sock) -> bytes:
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


@pytest.mark.parametrize("size", [8 * MIB + 1, 9 * MIB, 64 * MIB])
def test_a_body_over_the_limit(port, size):
    status, headers, body = request(port, body=b" " * size, headers=ENGLISH)
    assert (status, json.loads(body)) == (413, TOO_LARGE)
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert request(port, "GET", "/")[0] == 200


def test_a_body_at_the_limit(port):
    body = b'{"query": "q"}'
    assert request(port, body=body + b" " * (8 * MIB - len(body)))[0] == 200


@pytest.mark.parametrize("size", [8 * MIB + 1, 32 * MIB])
def test_a_chunked_body_over_the_limit(port, size):
    head = (
        b"POST /generate HTTP/1.1\r\nHost: x\r\nAccept-Language: en\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    chunk = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
    rest = b"%x\r\n%s\r\n" % (size % MIB, b" " * (size % MIB)) if size % MIB else b""
    answer = exchange(port, head, *[chunk] * (size // MIB), rest, b"0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ") and json.loads(body) == TOO_LARGE


def test_a_chunked_body_within_the_limit(port):
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = exchange(port, head, b'8\r\n{"query"\r\n', b'6\r\n: "q"}\r\n', b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"\r\n\r\na")


def test_a_body_that_is_announced_but_not_sent_is_refused_at_once(port):
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nAccept-Language: zh\r\nContent-Length: 99999999999\r\n\r\n"
    answer = exchange(port, head)
    assert answer.startswith(b"HTTP/1.1 413 ") and "请求体超过上限 8 MiB。".encode() in answer


def test_a_refused_body_is_not_read_as_a_request(port):
    inner = b"GET /generate?query=smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(port, b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", inner * 50)
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"POST /generate HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"no request at all\r\n\r\n",
        b"post / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 300_000 + b"\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_with_a_sentence(port, head):
    answer = exchange(port, head)
    first, _, body = answer.partition(b"\r\n\r\n")
    assert first.split(b" ")[1] in (b"400", b"431", b"501")
    assert json.loads(body)["success"] is False and b"waitress" not in answer
    assert request(port, "GET", "/")[0] == 200


@pytest.mark.parametrize(
    "line",
    [
        b"OPTIONS * HTTP/1.1",
        b"CONNECT a:80 HTTP/1.1",
        b"TRACE / HTTP/1.1",
        b"BREW /generate HTTP/1.1",
        b"GET http://other/generate HTTP/1.1",
        b"GET /%ff%00 HTTP/1.1",
        b"GET /generate?%ff=%ff&&=;& HTTP/1.0",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1",
        "GET /generate?query=你好 HTTP/1.1".encode("gbk"),
    ],
)
@pytest.mark.parametrize("host", [b"x", b"bad<host>", b"a:b:c", b""])
def test_odd_requests_get_an_answer(port, line, host):
    answer = exchange(port, line + b"\r\nHost: " + host + b"\r\nAccept: text/html\r\nConnection: close\r\n\r\n")
    assert 200 <= int(answer.split(b" ")[1]) < 500


def test_a_connection_is_used_again_after_an_error(port):
    bad = b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{"q'
    good = b"GET /generate?query=q HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(port, bad, good)
    assert answer.count(b"HTTP/1.1 400 ") == 1 and answer.endswith(b"\r\n\r\na")


def test_idle_connections_take_no_thread(port):
    idle = [socket.create_connection(("127.0.0.1", port), TIMEOUT) for _ in range(60)]
    assert request(port, body={"query": "q"})[0] == 200
    for sock in idle:
        sock.close()


def test_forwarded_addresses_are_not_believed():
    engine = FakeEngine("a")
    with serve(engine) as port:
        request(port, body={"query": "q"}, source="127.0.0.2", headers={"X-Forwarded-For": "9.9.9.9"})
    assert engine.requests[0].client == "127.0.0.2"

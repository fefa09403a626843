"""A real server on 127.0.0.1 and clients that record what comes over the wire, and when."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

from server.api import wsgi
from server.api.app import create_app
from server.api.dialect import ApiSettings

TIMEOUT = 20  # seconds; nothing here takes so long


@contextlib.contextmanager
def serve(engine, *, port: int = 0, **settings) -> Iterator[int]:
    """Run the application under waitress; yields the port."""
    sock = socket.create_server(("127.0.0.1", port))
    api = ApiSettings(**settings)
    server = wsgi.create_server(create_app(engine, api), engine, api, sock)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        engine.close()
        wsgi.stop(server)
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def request(port, method="POST", path="/generate", body=None, source="127.0.0.1", headers=None):
    """One exchange; returns status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT, source_address=(source, 0))
    data = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


class Streaming:
    """A POST whose response is read from the bare socket."""

    def __init__(self, port, path="/generate", source="127.0.0.1", **fields):
        body = json.dumps(fields).encode()
        self.socket = self.connect(port, source)
        self.socket.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)))
        self.socket.sendall(body)
        self.reads: list[tuple[float, bytes]] = []

    def connect(self, port, source):
        return socket.create_connection(("127.0.0.1", port), TIMEOUT, source_address=(source, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    @property
    def received(self) -> bytes:
        return b"".join(data for _, data in self.reads)

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            assert self._read(), self.received
        return self.received

    def read_all(self) -> bytes:
        while self._read():
            pass
        return self.received

    def _read(self) -> bytes:
        data = self.socket.recv(1 << 20)
        self.reads.append((time.perf_counter(), data))
        return data

    def chunks(self) -> list[bytes]:
        """The chunks of the whole response's body."""
        head, _, rest = self.received.partition(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        chunks = []
        while not rest.startswith(b"0\r\n\r\n"):
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            chunks.append(rest[:length])
            assert rest[length : length + 2] == b"\r\n"
            rest = rest[length + 2 :]
        return chunks


def wait_for(condition) -> None:
    """Until ``condition()`` holds; fails after a while."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)

"""A Hugging Face Hub and a ModelScope on 127.0.0.1, well behaved or not: what a download asks for, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "d2e2d91789248536a747d9ce60642a336444186c"
_PIECE = 65536  # bytes that are sent at a time


class Hub:
    """Serves ``repositories`` (name -> file -> content) inside its ``with`` block and keeps a log of what was asked.

    What it may do wrong, each by the ending of the path or the name of a file:
    ``statuses``: statuses answered in turn before the real answer. ``retry_after``: sent with them.
    ``cut``, ``reset``: the connection is closed or reset, once, after so many bytes. ``stall``: after so many bytes the
    answer hangs until the hub closes. ``claimed``: the size that the listing gives. ``announced``: the size that
    the answer's headers give. ``wrong``: other contents than the listing's. ``rate``: bytes per second of every answer.
    ``ignores_range``, ``compresses``: as they say. ``most``: bytes that an answer has at most.
    ``moved``: old repository -> new one, redirected as the Hub does. ``elsewhere``: files are redirected to /cdn on
    this server. ``slow_after``: after so many bytes the answer goes on with 20 kB per second.
    ``unhashed``, ``unsized``: listings have no SHA-256, or no sizes.
    ``locations``: file -> where its requests are redirected. ``signed``: files are redirected to addresses that are
    good for one request, each given out twice.

    ``pages``: file, or "listing" -> what is answered in place of it, with 200. ``chunked``: answers do not say
    how long they are. ``content_range``: that header, of every piece.

    ``certificate``: (certificate, key) with which it speaks https.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]], certificate: tuple[str, str] | None = None):
        self.repositories = repositories
        self._certificate = certificate
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.headers: list[Mapping[str, str]] = []  # of the same requests
        self.statuses: dict[str, list[int]] = {}
        self.retry_after = ""
        self.cut: dict[str, int] = {}
        self.reset: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.claimed: dict[str, int] = {}
        self.announced: dict[str, int] = {}
        self.wrong: dict[str, bytes] = {}
        self.rate: float | None = None
        self.ignores_range = False
        self.compresses = False
        self.moved: dict[str, str] = {}
        self.elsewhere: str | None = None
        self.slow_after: dict[str, int] = {}
        self.unhashed = False
        self.unsized = False
        self.most: int | None = None
        self.locations: dict[str, str] = {}
        self.signed = False
        self.pages: dict[str, bytes] = {}
        self.chunked = False
        self.content_range: str | None = None
        self._given = 0  # signed addresses, so far
        self._used: set[str] = set()
        self.stalled = threading.Event()
        self.closing = threading.Event()

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        if self._certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if self._certificate else 'http'}://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order, measuring not counted."""
        return [name for name, asked in self.ranges() if not re.fullmatch(r"bytes=\d+-\d+", asked)]

    def ranges(self, name: str | None = None) -> list:
        """(file, Range) of every request for a file's contents, or only the ranges of one file."""
        found = [(path.rpartition("/")[2], asked) for method, path, asked in self.requests
                 if method == "GET" and re.search(r"/resolve/|/repo/file/|/cdn/", path)]  # fmt: skip
        return found if name is None else [asked for file, asked in found if file == name]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that leaves is what these tests are about
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, address = self.hub, urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        if "FilePath" in query:  # as a path, for the log and the endings
            path = f"{path}/file/{query['FilePath'][0]}"
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        hub.headers.append(dict(self.headers))
        for ending, statuses in hub.statuses.items():
            if path.endswith(ending) and statuses:
                more = {"Retry-After": hub.retry_after} if hub.retry_after else {}
                return self._send(statuses.pop(0), b"refused by the test", **more)
        for old, new in hub.moved.items():
            if old in path:
                return self._send(307, b"", Location=self.path.replace(old, new))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            return self._modelscope_files(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[3])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/file/(.+)", path):
            return self._file(match[1], match[2])
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            if address.query in hub._used:
                return self._send(403, b"the address has expired")
            hub._used |= {address.query} - {""}
            return self._contents(match[1], match[2])
        return self._send(404, b"no such path")

    def _info(self, repository: str):
        if page := self.hub.pages.get("listing"):
            return self._send(200, page)
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        siblings = [
            {"rfilename": name, "size": self._size(name, content), "blobId": _etag(content), **self._lfs(name, content)}
            for name, content in files.items()
        ]
        return self._send(200, json.dumps({"id": repository, "sha": REVISION, "siblings": siblings}).encode())

    def _lfs(self, name: str, content: bytes) -> dict:
        """Large files are in git's LFS, and only of those the Hub knows the hash."""
        if self.hub.unhashed or not name.endswith((".bin", ".model", ".safetensors")):
            return {}
        return {"lfs": {"sha256": _etag(content), "size": self._size(name, content), "pointerSize": 135}}

    def _size(self, name: str, content: bytes) -> int | None:
        return None if self.hub.unsized else self.hub.claimed.get(name, len(content))

    def _modelscope_files(self, repository: str):
        if page := self.hub.pages.get("listing"):
            return self._send(200, page)
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._send(404, b'{"Code": 10010205001, "Success": false, "Message": "record not found"}')
        entries = [{"Name": "onnx", "Path": "onnx", "Type": "tree", "Size": 0, "Sha256": ""}]
        entries += [
            {"Name": name.rpartition("/")[2], "Path": name, "Type": "blob", "Size": self._size(name, content),
             "Sha256": "" if self.hub.unhashed else _etag(content)}
            for name, content in files.items()
        ]  # fmt: skip
        return self._send(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())

    def _file(self, repository: str, name: str):
        if name not in self.hub.repositories.get(repository, {}):
            return self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
        if location := self.hub.locations.get(name):
            return self._send(302, b"", Location=location)
        if self.hub.signed:
            self.hub._given += 1
            where = f"../../../../cdn/{repository}/{name}?ticket={(self.hub._given + 1) // 2}"
            return self._send(302, b"", Location=where)
        if self.hub.elsewhere:
            return self._send(302, b"", Location=f"{self.hub.elsewhere}/cdn/{repository}/{name}")
        return self._contents(repository, name)

    def _contents(self, repository: str, name: str):
        hub, content = self.hub, self.hub.repositories[repository][name]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if page := hub.pages.get(name):
            return self._send(200, page, name, **{"Content-Type": "text/html"})
        content, size = hub.wrong.get(name, content), hub.announced.get(name, len(content))
        if hub.compresses:
            headers["Content-Encoding"] = "gzip"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match or hub.ignores_range:
            return self._send(200, content, name, size=size, **headers)
        begin, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
        end = min(end, begin + hub.most - 1) if hub.most else end
        if begin >= size:
            return self._send(416, b"", **{"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = hub.content_range or f"bytes {begin}-{end}/{size}"
        return self._send(206, content[begin : end + 1], name, size=end + 1 - begin, **headers)

    def _send(self, status: int, body: bytes, name: str = "", *, size: int | None = None, **headers: str):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.hub.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        try:
            if len(body) > hub.cut.get(name, len(body)):
                self._write(body[: hub.cut.pop(name)])
                self.close_connection = True
            elif len(body) > hub.reset.get(name, len(body)):
                self._write(body[: hub.reset.pop(name)])
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()  # with unsent data thrown away, which makes it a reset
                self.close_connection = True
            elif name in hub.stall:
                self._write(body[: hub.stall[name]])
                hub.stalled.set()
                hub.closing.wait(60)
                self.close_connection = True
            elif name in hub.slow_after:
                self._write(body[: hub.slow_after[name]])
                for begin in range(hub.slow_after[name], len(body), 2000):
                    self.wfile.write(body[begin : begin + 2000])
                    if hub.closing.wait(0.1):
                        break
            else:
                self._write(body)
        except OSError:  # the client has left
            self.close_connection = True

    def _write(self, body: bytes) -> None:
        for begin in range(0, len(body), _PIECE):
            self.wfile.write(body[begin : begin + _PIECE])
            if self.hub.rate:
                time.sleep(min(_PIECE, len(body) - begin) / self.hub.rate)
        self.wfile.flush()


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

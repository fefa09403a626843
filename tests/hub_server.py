"""A Hugging Face Hub on 127.0.0.1: the few requests that huggingface_hub makes to download a model, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "d2e2d91789248536a747d9ce60642a336444186c"


class Hub:
    """Serves ``repositories`` (name -> file -> content) inside its ``with`` block and keeps a log of what was asked.

    ``statuses``: path ending -> statuses answered in turn before the real answer. ``cut``: file -> the connection is
    closed once after so many bytes. ``stall``: file -> after so many bytes the answer hangs until the hub closes.
    ``claimed``: file -> size that the listing gives. ``moved``: old repository -> new one, redirected as the Hub does.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]):
        self.repositories = repositories
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.statuses: dict[str, list[int]] = {}
        self.cut: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.claimed: dict[str, int] = {}
        self.moved: dict[str, str] = {}
        self.stalled = threading.Event()
        self.closing = threading.Event()

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        for ending, statuses in hub.statuses.items():
            if path.endswith(ending) and statuses:
                return self._send(statuses.pop(0), b"refused by the test")
        for old, new in hub.moved.items():
            if old in path:
                return self._send(307, b"", Location=self.path.replace(old, new))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[3])
        return self._send(404, b"no such path")

    def _info(self, repository: str):
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        siblings = [
            {"rfilename": name, "size": self.hub.claimed.get(name, len(content)), "blobId": _etag(content)}
            for name, content in files.items()
        ]
        return self._send(200, json.dumps({"id": repository, "sha": REVISION, "siblings": siblings}).encode())

    def _file(self, repository: str, name: str):
        content = self.hub.repositories.get(repository, {}).get(name)
        if content is None:
            return self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(match[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[begin:], name, **headers)
        return self._send(200, content, name, **headers)

    def _send(self, status: int, body: bytes, name: str = "", **headers: str):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        if name in hub.cut:
            self.wfile.write(body[: hub.cut.pop(name)])
            self.close_connection = True
        elif name in hub.stall:
            self.wfile.write(body[: hub.stall[name]])
            self.wfile.flush()
            hub.stalled.set()
            hub.closing.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

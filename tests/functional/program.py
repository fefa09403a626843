"""Starts the real program on a free port and talks to it like a client."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import ROOT


class Program:
    """``python -m server`` with options, from a copy in ``root`` if given; a context manager that ends it (SIGTERM)."""

    def __init__(
        self,
        *options: str,
        model: str = "demo",
        env: dict[str, str] | None = None,
        wait: bool = True,
        root: Path = ROOT,
    ):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM_")}
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "--model", model, "--port", "0", "--no-chat-log", *options],
            cwd=root,
            env={**clean, "CHATGLM_LANG": "en", "PYTHONUNBUFFERED": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0
        if wait:
            self.port = int(self.wait_for(r"ready: http://127\.0\.0\.1:(\d+)")[1])

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output.append(line)

    @property
    def text(self) -> str:
        return "".join(self.output)

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            time.sleep(0.02)
        return found

    def stop(self, how: int = signal.SIGTERM, seconds: float = 15) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._reader.join(5)
        return self.process.returncode

    def connect(self, **options) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60, **options)

    def post(self, path: str, body, **options) -> http.client.HTTPResponse:
        connection = self.connect(**options)
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        return connection.getresponse()

    def ask(self, query: str, **fields) -> str:
        """The whole plain answer to one question; greedy unless told otherwise."""
        response = self.post("/generate", {"query": query, "temperature": 0, **fields})
        text = response.read().decode()
        assert response.status == 200, text
        return text

    def events(self, query: str, path: str = "/generate", **fields):
        """Parsed events of a streamed answer, one by one."""
        response = self.post(path, {"query": query, "stream": True, "temperature": 0, **fields})
        assert response.status == 200
        return parse_events(response)


def parse_events(response):
    for line in response:
        if line.strip():
            assert line.startswith(b"data: "), line
            yield json.loads(line[6:])


def first_event(response):
    return next(parse_events(response))

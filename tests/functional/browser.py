"""A real headless Chromium, driven by its own DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from websocket import create_connection

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
TIMEOUT = 60  # seconds; nothing here takes so long


class Browser:
    """One empty page of a browser that finds no host but 127.0.0.1; a context manager that ends it.

    ``requested`` are the URLs that were asked for, ``complaints`` what the page's console heard of failures.
    """

    def __init__(self, folder: Path):
        program = next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self._last_id = 0
        options = ["--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # which does not work for root
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        self._process = subprocess.Popen(
            [program, *options, rules, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._socket = create_connection(self._address(folder), timeout=TIMEOUT, suppress_origin=True)
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _address(self, folder: Path) -> str:
        deadline = time.monotonic() + TIMEOUT
        while "/devtools/" not in (found := _read(folder / "DevToolsActivePort")):
            assert self._process.poll() is None and time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        port, path = found.split("\n")
        return f"ws://127.0.0.1:{port}{path}"

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(TIMEOUT)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools command's result; what happens meanwhile is noted."""
        self._last_id += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters, **session}))
        while (message := json.loads(self._socket.recv())).get("id") != self._last_id:
            self._note(message.get("method"), message.get("params", {}))
        assert "error" not in message, message
        return message["result"]

    def _note(self, event: str, parameters: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(parameters["entry"]["text"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + TIMEOUT
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} never became true; the console: {self.complaints}"
            time.sleep(0.05)
        return value


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""

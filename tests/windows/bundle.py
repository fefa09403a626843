"""An unpacked bundle, started as a user starts it."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.windows.rig import Rig, run_quietly

STARTED = r"(?:ready|已就绪)[:：] ?(http://127\.0\.0\.1:\d+)"


class Bundle:
    """The folder of an unpacked bundle, and how its .bat files are double-clicked or called."""

    def __init__(self, rig: Rig, root: Path):
        self.rig, self.root = rig, root
        self.python = root / "system" / "python"
        self.site = self.python / "Lib" / "site-packages"

    def command(self, bat: str, *arguments: str, page: int = 936, env: Mapping[str, str] | None = None) -> list[str]:
        """As administrator does: in System32. Explorer's command line is what tells .bat files to keep the window."""
        path = self.rig.windows_path(self.root / bat)
        clicked = {"CMDCMDLINE": f'C:\\windows\\system32\\cmd.exe /c ""{path}" "'}  # wine's cmd does not set it
        folder = "/lab/" + str(self.rig.system32.relative_to(self.rig.lab))
        return self.rig.command("wine", path, *arguments, page=page, folder=folder, env={**clicked, **(env or {})})

    def run(self, bat: str, *arguments: str, timeout: float = 300, **how) -> subprocess.CompletedProcess[str]:
        return run_quietly(self.command(bat, *arguments, **how), timeout)

    def ask_python(self, code: str) -> str:
        """What the bundle's Python prints for a piece of code."""
        python = self.rig.windows_path(self.python / "python.exe")
        done = self.rig.run("wine", python, "-E", "-s", "-X", "utf8", "-c", code)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()


def kept_window(output: str) -> bool:
    """Whether the last thing said is cmd's own "press any key", in the language and code page of that Windows."""
    last = output.rstrip().encode("utf-8", "surrogateescape").splitlines()[-1]
    return last.startswith((b"Press any key", "请按任意键".encode("gbk"), "请按任意键".encode()))


class Running:
    """A launcher that serves at --port; a context manager that ends it as Task Manager does."""

    def __init__(self, bundle: Bundle, bat: str, *arguments: str, model: str = "demo", **how):
        self._port = " ".join(arguments[arguments.index("--port") :][:2])
        options = ("--model", model) if model else ()
        self.process = subprocess.Popen(bundle.command(bat, *options, *arguments, **how), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                                        errors="surrogateescape")  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()
        self.url = self.wait_for(STARTED, 600)[1]  # a first start may install packages

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match:
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}"
            time.sleep(0.05)
        return found

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_) -> None:
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or ())
            if "-m server" in words and self._port in words and "python.exe" in words:
                process.kill()
        self.end()

    def end(self, seconds: float = 60) -> int:
        """Wait for the window's end; returns the exit code."""
        self.process.wait(seconds)
        self._reader.join(5)
        return self.process.returncode

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def post(self, path: str, **fields):
        request = urllib.request.Request(self.url + path, json.dumps(fields).encode())
        return urllib.request.urlopen(request, timeout=60)

    def events(self, query: str, **fields) -> Iterator[dict]:
        """Parsed events of a streamed answer, one by one."""
        with self.post("/generate", query=query, stream=True, temperature=0, **fields) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

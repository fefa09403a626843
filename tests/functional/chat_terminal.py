"""A terminal in which the real chat runs: what is typed goes in, what a user would see comes out."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time

import ptyprocess
import pyte

from tests.conftest import ROOT

COLUMNS, ROWS = 80, 60
CTRL_C, CTRL_D, UP, ENTER, ALT_ENTER = "\x03", "\x04", "\x1b[A", "\r", "\x1b\r"


class ChatTerminal:
    """``python -m server chat`` with options; a context manager that ends what is left of it."""

    def __init__(self, *options: str, language: str = "en"):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM_")}
        self.raw = b""  # everything that was ever written
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._process = ptyprocess.PtyProcess.spawn(
            [sys.executable, "-m", "server", "chat", *options],
            cwd=str(ROOT),
            env={**clean, "CHATGLM_LANG": language, "TERM": "xterm-256color"},
            dimensions=(ROWS, COLUMNS),
        )
        # a real terminal tells where its cursor is when it is asked
        self._screen.write_process_input = lambda data: self._process.write(data.encode())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> ChatTerminal:
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate(force=True)
        self._reader.join(10)  # before close(), which would wait for its read
        self._process.close()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                data = self._process.read(65536)
                with self._lock:
                    self.raw += data
                    self._stream.feed(data)

    @property
    def shown(self) -> str:
        """The screen, without what is blank at its right and at its bottom."""
        with self._lock:
            return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def type(self, text: str) -> None:
        self._process.write(text.encode())

    def paste(self, text: str) -> None:
        """As terminals do where the program has asked to be told: marked, with returns for newlines."""
        self.type(f"\x1b[200~{text}\x1b[201~".replace("\n", "\r"))

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match:
        """Until the screen shows it; ``$`` is the end of what is shown."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            alive = self._process.isalive()
            assert alive and time.monotonic() < deadline, f"no {pattern!r} on the screen:\n{self.shown}"
            time.sleep(0.01)
        return found

    def ask(self, question: str, answer: str) -> None:
        """Type a question at the prompt and wait for the answer and the next prompt."""
        self.type(question + ENTER)
        self.wait_for(re.escape(f"You: {question}\n\nChatGLM: {answer}\n\nYou:") + "$")

    def exit_code(self, seconds: float = 30) -> int:
        """Of a program that was told to end."""
        deadline = time.monotonic() + seconds
        while self._process.isalive():
            assert time.monotonic() < deadline, f"still running:\n{self.shown}"
            time.sleep(0.01)
        return self._process.exitstatus

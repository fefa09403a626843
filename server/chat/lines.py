"""A chat through pipes: a question a line, nothing but answers on standard output, an empty line where one fails."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


class Lines:
    """See ``loop.Screen``. ``failed`` tells whether any question was left without its whole answer."""

    def __init__(self) -> None:
        self.failed = False

    def read(self, draft: str) -> str | None:
        line = sys.stdin.buffer.readline()
        return _decode(line).rstrip("\r\n") if line else None

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        try:
            yield lambda: False  # Ctrl+C ends the program here
        finally:
            print(flush=True)

    def show(self, text: str) -> None:
        print(text, end="", flush=True)

    def notice(self, text: str) -> None:
        """What is said of commands is nothing for a script."""

    def fail(self, text: str) -> None:
        self.failed = True
        print(text, file=sys.stderr)

    def clear(self) -> None:
        """There is no screen."""


def _decode(line: bytes) -> str:
    """UTF-8, with or without its BOM, or GBK, which cmd.exe on a Chinese Windows sends."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("gb18030", "replace")

"""The real spool with an engine that repeats what it was asked: a program that starts in no time, to be killed.

    python spool_driver.py FOLDER
"""

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from server.core import GenerationRequest, Message
from server.spool import loop
from server.spool.folder import open_folder
from tests.fake_engine import FakeEngine, FakeStream


def echo(query: str, *history: tuple[str, str]) -> str:
    """What EchoEngine answers: long enough for a half of it to be noticed."""
    return f"begin {query} {json.dumps(history, ensure_ascii=False)} end " * 20


class EchoEngine(FakeEngine):
    """Answers with its question and the history; ``steps`` are played before the last piece of the answer."""

    def __init__(self, *steps, **options):
        super().__init__(**options)
        self.steps = steps

    def submit(self, request: GenerationRequest) -> FakeStream:
        *past, query = (message.content for message in request.messages)
        text = echo(query, *zip(past[::2], past[1::2], strict=True))
        self.script = (text[:5], *self.steps, text[5:])
        return super().submit(request)


def read(request: bytes, history: bytes) -> tuple[Message, ...]:
    texts = [text for turn in json.loads(history or b"[]") for text in turn]
    return tuple(Message("user", text) for text in (*texts, request.decode()))


def main(root: Path) -> None:
    loop.SETTLE = loop.IDLE = loop.BUSY = 0.005
    with open_folder(root) as folder:
        loop.Spool(folder, EchoEngine(), read, at_once=3, language="en").run(threading.Event())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

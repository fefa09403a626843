"""Ctrl+C that is never lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and in a destructor or a callback of some
library it is only printed ("Exception ignored in ...") and gone. So the work goes into a thread of its own, and the
main thread does nothing but wait for it and for the signal.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_TURN = 0.2  # seconds; without a timeout Windows would not deliver Ctrl+C
_LAST_STEP = 2.0  # seconds for the work to notice that it is to stop


def run(work: Callable[[threading.Event], T]) -> T:
    """What ``work(stop)`` returns or raises. Ctrl+C sets ``stop`` and raises KeyboardInterrupt, here and at once.

    Only the main thread can wait for the signal; called in another one, it only does the work.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return work(stop)
    result: Future[T] = Future()

    def body() -> None:
        try:
            result.set_result(work(stop))
        except BaseException as error:  # the main thread raises it
            result.set_exception(error)

    thread = threading.Thread(target=body, name="download", daemon=True)  # one that waits for a server is left behind
    with _sigint_sets(stop):
        thread.start()
        while not stop.is_set() and thread.is_alive():
            thread.join(_TURN)
        if stop.is_set():
            thread.join(_LAST_STEP)
            raise KeyboardInterrupt
    return result.result()


@contextlib.contextmanager
def _sigint_sets(stop: threading.Event) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

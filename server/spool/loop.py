"""Answers the requests of a spool folder (chatapi-server-module-chatglm6b's way): one thread, many answers at once."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from server.core import (
    Engine,
    FinishReason,
    GenerationRequest,
    Message,
    Overflow,
    RequestOutput,
    RequestStream,
    SamplingParams,
)
from server.errors import BadRequest, GenerationFailed, Overloaded, ServerError, ShuttingDown
from server.spool.folder import SpoolFolder
from server.spool.names import check_name
from server.spool.stamps import Inputs

SETTLE = 0.5  # seconds that a request and its history must stay as they are before they are taken for complete
SETTLE_EMPTY = 10.0  # the same for an empty request: `program > NAME.request` makes one until the program writes
SETTLE_OPEN = 60.0  # the same where the program that writes it has not closed it
IDLE, BUSY = 0.2, 0.02  # seconds between two looks at the flags, and between two looks at running answers
SCAN_SHARE, SCAN_LONGEST = 0.005, 10.0  # of a core that looking at a large folder may take, and seconds between looks
PARAMS = SamplingParams(temperature=0.95, top_p=0.7)  # of the official model.chat, which the original called

log = logging.getLogger(__name__)


@dataclass
class _Waiting:
    inputs: Inputs
    since: float  # monotonic seconds: how long the inputs have been what they are


@dataclass
class _Running:
    inputs: Inputs
    query: str
    stream: RequestStream
    text: str = ""


@dataclass
class _Refused:
    inputs: Inputs
    sentence: str
    noted: bool = False  # NAME.error could be written


class Spool:
    """Gives a folder's requests to an engine, ``at_once`` at a time in order of arrival, and writes the answers.

    ``read(request, history)`` makes messages of the bytes of the two files and raises ServerError; ``record`` is the
    chat log's. A request that is refused is tried again when it changes, its NAME.error is removed or the program is
    started again.
    """

    def __init__(
        self,
        folder: SpoolFolder,
        engine: Engine,
        read: Callable[[bytes, bytes], tuple[Message, ...]],
        *,
        at_once: int,
        language: str,
        record: Callable[..., Any] | None = None,
    ):
        self._folder = folder
        self._engine = engine
        self._read = read
        self._at_once = at_once
        self._language = language
        self._record = record
        # by name, and in order of arrival; a name is in one of them
        self._waiting: dict[str, _Waiting] = {}
        self._refused: dict[str, _Refused] = {}
        self._running: dict[str, _Running] = {}
        self._answered: dict[str, tuple[Inputs, str]] = {}
        self._stored: dict[str, str | None] = dict(folder.left)  # JOB -> name
        self._troubles: set[tuple[str, str]] = set()  # that were told
        self._next_scan = self._next_start = 0.0  # monotonic seconds
        self._status_failed = self._quitting = False

    def run(self, told: threading.Event) -> None:
        """Answer requests until ``told`` is set or quit.flag is put up.

        Answers that are being made when ``told`` is set are dropped; their requests stay in the folder. Raises
        StartupError if the folder was removed and another program answers the new one.
        """
        _print_info("Loaded.")
        _print_info("Running...")
        try:
            while not told.is_set() and self.turn():
                told.wait(BUSY if self._running else IDLE)
        finally:
            for running in self._running.values():
                running.stream.close()

    def turn(self) -> bool:
        """One look at everything; False when the program is to end."""
        for name in list(self._running):
            self._read_answer(name)
        self._save()
        with self._tolerating("quit.flag"):
            self._obey_quit()
        with self._tolerating("status.flag"):
            self._obey_status()
        if time.monotonic() >= self._next_scan:
            with self._tolerating("requests"):
                self._scan()
        if time.monotonic() >= self._next_start and not self._quitting:
            self._start_waiting()
        return bool(self._running) or not self._quitting

    def _obey_quit(self) -> None:
        if self._folder.flag_is_up("quit") and not self._quitting:
            self._quitting = True
            log.info("quit.flag: %d answers to finish", len(self._running))
            self._folder.lower_flag("quit")

    def _obey_status(self) -> None:
        if not self._folder.flag_is_up("status") or (self._status_failed and time.monotonic() < self._next_scan):
            return
        self._status_failed = True
        self._scan()
        self._folder.write_status(self._status())
        self._status_failed = False

    def _status(self) -> str:
        """The original's ``Status`` in its only word, and what it did not say."""
        running = [*self._running, *self._answered, *filter(None, self._stored.values())]
        status = {
            "Status": "running" if running or self._waiting else "idle",
            "Running": running,
            "Queue": len(self._waiting),
            "Waiting": list(self._waiting),
            "Refused": list(self._refused),
        }
        return json.dumps(status, ensure_ascii=False, indent=1) + "\n"

    def _scan(self) -> None:
        """See which requests came, went and changed."""
        worked, passed = time.thread_time(), time.perf_counter()
        if not self._folder.is_claimed():
            self._folder.claim()
            log.warning("%s was removed; going on with the new one", self._folder.requests)
            self._stored = dict(self._folder.left)
        seen = self._folder.scan()
        for table in (self._waiting, self._refused):
            for name in table.keys() - seen.keys():
                del table[name]
        for name, running in list(self._running.items()):
            if seen.get(name) != running.inputs:  # taken back, or asked anew
                running.stream.close()
                del self._running[name]
        busy = {*self._running, *self._answered, *self._stored.values()}
        for name, inputs in seen.items():
            if name not in busy:
                self._admit(name, inputs)
        # the first of them steps by 16 ms on Windows, the second one counts what others do
        pause = min(time.thread_time() - worked, time.perf_counter() - passed) / SCAN_SHARE
        self._next_scan = time.monotonic() + min(max(pause, IDLE), SCAN_LONGEST)

    def _admit(self, name: str, inputs: Inputs) -> None:
        if refused := self._refused.get(name):
            if refused.inputs == inputs and (not refused.noted or self._folder.is_refused(name)):
                self._note(name, refused)
                return
            del self._refused[name]
        waiting = self._waiting.setdefault(name, _Waiting(inputs, time.monotonic()))
        if waiting.inputs != inputs:
            waiting.inputs, waiting.since = inputs, time.monotonic()

    def _start_waiting(self) -> None:
        for name, waiting in list(self._waiting.items()):
            if len(self._running) >= self._at_once:
                return
            settle = SETTLE if waiting.inputs.request.size else SETTLE_EMPTY
            if time.monotonic() - waiting.since < settle:
                continue
            try:
                self._start(name, waiting)
            except Overloaded:  # HTTP clients have all the places
                self._next_start = time.monotonic() + IDLE
                return
            except FileNotFoundError:
                pass  # taken back; the next scan sees it
            except ServerError as error:
                self._refuse(name, waiting.inputs, error)
            except OSError as error:
                self._refuse(name, waiting.inputs, _unreadable(error))
            except Exception:
                log.exception("%r failed", name)
                self._refuse(name, waiting.inputs, _DEFECT)

    def _start(self, name: str, waiting: _Waiting) -> None:
        check_name(name)
        if time.monotonic() - waiting.since < SETTLE_OPEN and self._folder.is_being_written(name):
            self._tell(name, "waiting for the program that has it open")
            return
        messages = self._read(*self._folder.read(name))
        if self._folder.look(name) != waiting.inputs:
            return
        request = GenerationRequest(messages, overflow=Overflow.DROP_OLDEST, params=PARAMS, client="spool")
        stream = self._engine.submit(request)
        del self._waiting[name]
        self._running[name] = _Running(waiting.inputs, messages[-1].content, stream)
        self._folder.forgive(name)

    def _read_answer(self, name: str) -> None:
        """Take what is new of a running answer, and act on its end."""
        running = self._running[name]
        while (output := _next_output(running.stream)) is not None:
            running.text += output.text
            if output.finish_reason:
                del self._running[name]
                self._end(name, running, output)
                return

    def _end(self, name: str, running: _Running, final: RequestOutput) -> None:
        if final.finish_reason is FinishReason.ABORT or isinstance(final.error, ShuttingDown):
            return  # somebody interrupted it, or the engine stops: the request is still there
        if self._record:
            self._record(
                client="spool",
                request_id=running.stream.request_id,
                query=running.query,
                answer=running.text,
                final=final,
            )
        if final.error:
            self._refuse(name, running.inputs, final.error)
        else:
            self._answered[name] = running.inputs, running.text

    def _save(self) -> None:
        """Bring answers into requests/; what fails is tried again in the next turn."""
        for name, (inputs, text) in list(self._answered.items()):
            with self._tolerating(name):
                try:
                    self._stored[self._folder.store(name, inputs, text.encode())] = name
                except ServerError as error:
                    self._refuse(name, inputs, error)
                del self._answered[name]
        for job, name in list(self._stored.items()):
            with self._tolerating(name or job):
                given = self._folder.conclude(job)
                del self._stored[job]
                if name:
                    log.info("%r: %s", name, "answered" if given else "taken back")

    def _refuse(self, name: str, inputs: Inputs, error: ServerError) -> None:
        sentence = error.text(self._language)
        log.warning("%r: %s", name, sentence)
        self._waiting.pop(name, None)
        self._refused[name] = _Refused(inputs, sentence)
        self._note(name, self._refused[name])

    def _note(self, name: str, refused: _Refused) -> None:
        """Write NAME.error unless it has been; what fails is tried again with the next scan."""
        if not refused.noted:
            with self._tolerating(name):
                self._folder.refuse(name, refused.sentence)
                refused.noted = True

    @contextlib.contextmanager
    def _tolerating(self, subject: str) -> Iterator[None]:
        """Whatever the system refuses now may work later; it is told once."""
        try:
            yield
        except OSError as error:
            self._tell(subject, error.strerror or str(error))
        else:
            self._troubles -= {told for told in self._troubles if told[0] == subject}

    def _tell(self, subject: str, trouble: str) -> None:
        if (subject, trouble) not in self._troubles:
            self._troubles.add((subject, trouble))
            log.warning("%r: %s", subject, trouble)


_DEFECT = GenerationFailed("处理这个请求时出错，详见程序的输出。", "The request failed; see the program's output.")


def _unreadable(error: OSError) -> BadRequest:
    return BadRequest(f"请求文件读不了（{error.strerror}）：请检查权限，改好后删掉这个 .error 文件。",
                      f"The request cannot be read ({error.strerror}): check its permissions, then remove this .error "
                      "file.")  # fmt: skip


def _next_output(stream: RequestStream) -> RequestOutput | None:
    try:
        return stream.get(0.0)
    except Exception:
        log.exception("reading the answer %s failed", stream.request_id)
        return RequestOutput(finish_reason=FinishReason.ERROR, error=_DEFECT)


def _print_info(text: str) -> None:
    print(f"[Info {datetime.now():%Y-%m-%d %H:%M:%S}]: {text}", flush=True)

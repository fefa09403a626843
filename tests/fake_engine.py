"""A hand-made engine that follows a script: the API's tests need no model."""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

from server.core import Embeddings, FinishReason, GenerationRequest, RequestOutput, Tokenization, Usage
from server.errors import Overloaded, ServerError, ShuttingDown

# A step of a script: a text to say, seconds to wait, an event to wait for, a failure, or a whole output.
Step = str | float | threading.Event | ServerError | RequestOutput


class FakeStream:
    """Plays its script while it is read; ``close()`` ends it with FinishReason.ABORT."""

    def __init__(self, engine: FakeEngine, request: GenerationRequest, request_id: str, script: Sequence[Step]):
        self.request = request
        self.request_id = request_id
        self.prompt_ids = request.prompt_ids or (1, 2, 3, 4, 5, 6, 7)
        self.prompt_text = request.prompt or "<prompt>"
        self.failure: ServerError | None = None
        self.closed = threading.Event()
        self.ended = False
        self._engine = engine
        self._steps = list(script)
        self._words = 0

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        deadline = time.perf_counter() + (1e6 if timeout is None else timeout)
        while not self.ended:
            if self.closed.is_set():
                return self._end(FinishReason.ERROR if self.failure else FinishReason.ABORT, self.failure)
            step = self._steps[0] if self._steps else FinishReason.STOP
            if isinstance(step, float):
                step = self._steps[0] = _Due(time.perf_counter() + step)
            if isinstance(step, (_Due, threading.Event)):
                if not step.is_set():
                    if time.perf_counter() >= deadline:
                        return None
                    self.closed.wait(0.002)
                    continue
                self._steps.pop(0)
                continue
            return self._say(step)
        time.sleep(max(0.0, deadline - time.perf_counter()))
        return None

    def _say(self, step: str | ServerError | RequestOutput | FinishReason) -> RequestOutput:
        if isinstance(step, FinishReason):
            return self._end(step)
        self._steps.pop(0)
        if isinstance(step, ServerError):
            return self._end(FinishReason.ERROR, step)
        if isinstance(step, RequestOutput):
            self.ended = step.finish_reason is not None
            return step
        self._words += 1
        return RequestOutput(text=step)

    def _end(self, reason: FinishReason, error: ServerError | None = None) -> RequestOutput:
        self.ended = True
        self._engine.release(self)
        return RequestOutput(finish_reason=reason, usage=Usage(7, self._words), error=error)

    def __iter__(self) -> Iterator[RequestOutput]:
        while not self.ended:
            output = self.get()
            if output is not None:
                yield output

    def close(self) -> None:
        self.closed.set()
        self._engine.release(self)


class _Due:
    def __init__(self, when: float):
        self._when = when

    def is_set(self) -> bool:
        return time.perf_counter() >= self._when


class FakeEngine:
    """Gives every request the same ``script``; the answer prefix comes first, as a real engine's does.

    ``refuse`` is raised by submit, ``requests`` and ``streams`` are everything it was ever asked.
    """

    model_name = "fake-chatglm"
    embedding_model = "fake-text2vec"

    def __init__(self, *script: Step, capacity: int = 4, slots: int = 0, max_length: int = 4096):
        self.script = script
        self.capacity = capacity
        self.slots = slots or capacity
        self.max_length = max_length
        self.refuse: Exception | None = None
        self.requests: list[GenerationRequest] = []
        self.streams: list[FakeStream] = []
        self.freed = 0
        self.aborts: list[dict[str, str | None]] = []
        self._running: list[FakeStream] = []
        self._lock = threading.Lock()
        self._ids = itertools.count(1)

    def submit(self, request: GenerationRequest) -> FakeStream:
        if self.refuse:
            raise self.refuse
        with self._lock:
            if len(self._running) >= self.capacity:
                raise Overloaded("服务器已满。", "The server is full.", retry_after=3)
            prefix = [request.answer_prefix] if request.answer_prefix else []
            script = [*self.script]
            first = next((i for i, step in enumerate(script) if isinstance(step, (str, RequestOutput))), len(script))
            script[first:first] = prefix
            stream = FakeStream(self, request, f"request-{next(self._ids)}", script)
            self._running.append(stream)
            self.requests.append(request)
            self.streams.append(stream)
            return stream

    def release(self, stream: FakeStream) -> None:
        with self._lock:
            if stream in self._running:
                self._running.remove(stream)

    def abort(self, *, request_id: str | None = None, client: str | None = None) -> int:
        self.aborts.append({"request_id": request_id, "client": client})
        with self._lock:
            hit = [s for s in self._running if s.request_id == request_id or s.request.client == client]
        for stream in hit:
            stream.close()
        return len(hit)

    def tokenize(self, text: str) -> Tokenization:
        pieces = tuple("▁" + word for word in text.split())
        ids = tuple(range(len(pieces)))
        return Tokenization(ids, pieces, (101, 102, *ids))

    def embed(self, texts: Sequence[str], gone: Callable[[], bool] = lambda: False) -> Embeddings:
        if self.refuse:
            raise self.refuse
        vectors = tuple(array("f", [len(text), 0.1]) for text in texts)
        return Embeddings(vectors, sum(map(len, texts)))

    def free_caches(self) -> None:
        self.freed += 1

    def close(self, timeout: float | None = None) -> None:
        with self._lock:
            running = list(self._running)
        for stream in running:
            stream.failure = ShuttingDown()
            stream.close()

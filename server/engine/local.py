"""The engine that runs a model in this process: one thread owns the model, requests come and go between its steps."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass

from server.core import FinishReason, GenerationRequest, Tokenization
from server.engine.answer import AnswerText, LocalRequestStream
from server.engine.kv_cache import KVCache
from server.engine.prompting import fit_prompt
from server.engine.runner import ModelRunner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.slots import SlotTable
from server.errors import BadRequest, GenerationFailed, Overloaded
from server.models.loader import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """``max_length`` in tokens (prompt and answer), ``slots`` sequences at once, ``queue`` more waiting,
    ``prefill_chunk`` prompt tokens per step."""

    max_length: int = 2048
    slots: int = 4
    queue: int = 16
    prefill_chunk: int = 256


class LocalEngine:
    """See ``core.Engine``. The thread sees token ids only; text is made in the callers' threads."""

    def __init__(self, model: LoadedModel, settings: EngineSettings):
        self.model_name = model.name
        self.max_length = settings.max_length
        self.capacity = settings.slots + settings.queue
        self._model = model
        self._stop_ids = model.family.stop_ids(model.tokenizer)
        cache = KVCache(
            model.network.kv_shape, settings.slots, settings.max_length, model.dtype, model.device, model.prefix
        )
        self._runner = ModelRunner(model.network, cache, model.device)
        slots = SlotTable(cache, reuse_prefix=model.family.causal_prompt)
        self._scheduler = Scheduler(slots, chunk=settings.prefill_chunk, causal_prompt=model.family.causal_prompt)
        self._live: dict[str, Sequence] = {}  # admitted and not yet finished, guarded by the condition
        self._arrived: list[Sequence] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> LocalRequestStream:
        self._check_room()  # before the work of tokenizing
        params = request.params
        self._check_ids(request.prompt_ids)
        prompt_ids = fit_prompt(self._model.family, self._model.tokenizer, request, self.max_length)
        limits = [self.max_length, params.max_length, params.max_tokens and len(prompt_ids) + params.max_tokens]
        max_total = min(filter(None, limits))
        sequence = Sequence(
            f"req-{uuid.uuid4().hex[:16]}",
            prompt_ids,
            params,
            self._stop_ids,
            max_total,
            client=request.client,
            context=self._model.network.context(prompt_ids),
        )
        answer = AnswerText(
            self._model.family,
            self._model.tokenizer,
            prefix=request.answer_prefix,
            stop=params.stop,
            context=prompt_ids if request.answer_prefix else (),
        )
        with self._wake:
            self._check_room()
            self._live[sequence.request_id] = sequence
            self._arrived.append(sequence)
            self._wake.notify()
        return LocalRequestStream(sequence, answer)

    def abort(self, *, request_id: str | None = None, client: str | None = None) -> int:
        with self._wake:
            running = [s for s in self._live.values() if s.finished is None]
            chosen = [s for s in running if s.request_id == request_id or s.client == client]
            for sequence in chosen:
                sequence.finish(FinishReason.ABORT)
            self._wake.notify()
        return len(chosen)

    def tokenize(self, text: str) -> Tokenization:
        tokenizer = self._model.tokenizer
        return Tokenization(tuple(tokenizer.encode(text)), tuple(tokenizer.pieces(text)))

    def close(self, timeout: float | None = None) -> None:
        with self._wake:
            self._closing = True
            for sequence in self._live.values():
                sequence.finish(FinishReason.ABORT)
            self._wake.notify()
        self._thread.join(timeout)

    def _check_room(self) -> None:
        if self._closing:
            raise Overloaded("服务器正在关闭。", "The server is shutting down.")
        if len(self._live) >= self.capacity:
            raise Overloaded(
                f"服务器正忙：已有 {self.capacity} 个请求在处理或排队，请稍后再试。",
                f"The server is busy: {self.capacity} requests are running or waiting; try again shortly.",
            )

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        vocab = self._model.network.vocab_size
        if any(not 0 <= i < vocab for i in ids):
            raise BadRequest(
                f"prompt 里有超出词表的 token id，允许的范围是 0 到 {vocab - 1}。",
                f"The prompt has a token id outside the vocabulary; 0 to {vocab - 1} are allowed.",
                param="prompt",
            )

    def _loop(self) -> None:
        try:
            while not self._closing:
                self._take_arrivals()
                self._step()
        except Exception:  # a defect of ours; without this, every reader would wait for ever
            log.exception("the engine's thread ended")
        finally:
            self._give_up()

    def _take_arrivals(self) -> None:
        """Move new requests to the scheduler; sleep while there is nothing to do."""
        with self._wake:
            while not (self._arrived or self._closing or self._scheduler.unfinished):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
        for sequence in arrived:
            self._scheduler.add(sequence)

    def _step(self) -> None:
        self._retire()
        work = self._scheduler.schedule()
        if work:
            self._scheduler.postprocess(work, self._runner.run(work))
            self._retire()

    def _retire(self) -> None:
        for sequence in self._scheduler.collect_finished():
            with self._wake:
                del self._live[sequence.request_id]
            _log_finished(sequence)

    def _give_up(self) -> None:
        with self._wake:
            self._closing = True
            for sequence in self._live.values():
                sequence.finish(
                    FinishReason.ERROR,
                    GenerationFailed(
                        "生成线程已停止，请重新启动程序。", "The engine has stopped; restart the program."
                    ),
                )
            self._live.clear()


def _log_finished(sequence: Sequence) -> None:
    answer = len(sequence.token_ids) - sequence.num_prompt
    seconds = time.monotonic() - (sequence.first_token or sequence.submitted)
    log.info(
        "%s: prompt %d (%d cached), answer %d tokens, %.1f tokens/s, %s",
        sequence.request_id,
        sequence.num_prompt,
        sequence.num_cached,
        answer,
        (answer - 1) / seconds if answer > 1 and seconds > 0 else 0.0,
        sequence.finished.reason.value,
    )

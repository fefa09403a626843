"""The engine that runs a model in this process: one thread owns the model, requests come and go between its steps."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Texts
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.core import Embeddings, FinishReason, GenerationRequest, Tokenization
from server.engine.answer import AnswerText, LocalRequestStream
from server.engine.kv_cache import KVCache
from server.engine.prompting import fit_prompt
from server.engine.runner import ModelRunner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.slots import SlotTable
from server.engine.speculation import Drafter, PromptLookup, Speculation
from server.errors import BadRequest, GenerationFailed, Overloaded, ShuttingDown, Unavailable
from server.models.loader import LoadedModel

if TYPE_CHECKING:
    from server.engine.embedder import Embedder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """``max_length`` in tokens (prompt and answer), ``slots`` sequences at once, ``queue`` more waiting,
    ``prefill_chunk`` prompt tokens per step, ``speculate`` ids drafted per answer and step at most (None: as many as
    pay, 0: none) where a row more costs ``row_cost`` of a step of one row, ``kept`` slots more of the KV cache, in
    which only finished sequences wait for their next round."""

    max_length: int = 2048
    slots: int = 4
    queue: int = 16
    prefill_chunk: int = 256
    speculate: int | None = None
    row_cost: float = 0.1
    kept: int = 0


class LocalEngine:
    """See ``core.Engine``. The thread sees token ids only; text is made in the callers' threads."""

    def __init__(self, model: LoadedModel, settings: EngineSettings, embedder: Embedder | None = None):
        self.model_name = model.name
        self.embedding_model = embedder.name if embedder else ""
        self.max_length = settings.max_length
        self.slots = settings.slots
        self.capacity = settings.slots + settings.queue
        self._model = model
        self._embedder = embedder
        self._stop_ids = model.family.stop_ids(model.tokenizer)
        stretches = settings.slots + settings.kept
        cache = KVCache(
            model.network.kv_shape, stretches, settings.max_length, model.kv_dtype, model.device, model.prefix
        )
        self._runner = ModelRunner(model.network, cache, model.device)
        self._slots = SlotTable(cache, settings.slots, reuse_prefix=model.family.causal_prompt)
        self._speculates = settings.speculate != 0
        self._scheduler = Scheduler(
            self._slots,
            chunk=settings.prefill_chunk,
            causal_prompt=model.family.causal_prompt,
            speculation=Speculation(settings.speculate, settings.row_cost) if self._speculates else None,
        )
        self._live: dict[str, Sequence] = {}  # admitted and not yet retired, guarded by the condition
        self._arrived: list[Sequence] = []
        self._wake = threading.Condition()
        self._forget = False
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> LocalRequestStream:
        self._check_room()  # before the work of tokenizing
        self._check(request)
        family, tokenizer = self._model.family, self._model.tokenizer
        prompt = fit_prompt(family, tokenizer, request, self.max_length)
        sequence = self._sequence(request, prompt.ids)
        answer = AnswerText(family, tokenizer, request, prompt)
        stream = LocalRequestStream(sequence, answer, tokenizer)  # before the thread appends to the ids
        with self._wake:
            self._check_room()
            self._live[sequence.request_id] = sequence
            self._arrived.append(sequence)
            self._wake.notify()
        return stream

    def abort(self, *, request_id: str | None = None, client: str | None = None) -> int:
        with self._wake:
            running = [s for s in self._live.values() if s.finished is None]
            chosen = [s for s in running if s.request_id == request_id or s.client == client]
            for sequence in chosen:
                sequence.finish(FinishReason.ABORT)
            self._wake.notify()
        return len(chosen)

    def tokenize(self, text: str) -> Tokenization:
        family, tokenizer = self._model.family, self._model.tokenizer
        ids, pieces = tokenizer.encode(text), tokenizer.pieces(text)
        return Tokenization(tuple(ids), tuple(pieces), tuple(family.encode(tokenizer, text)))

    def embed(self, texts: Texts[str], gone: Callable[[], bool] = lambda: False) -> Embeddings:
        if self._embedder is None:
            raise Unavailable("这里没有向量模型。", "There is no sentence model here.")
        return self._embedder.embed(texts, gone)

    def free_caches(self) -> None:
        with self._wake:
            self._forget = True
            self._wake.notify()

    def close(self, timeout: float | None = None) -> None:
        with self._wake:
            self._closing = True
            for sequence in self._live.values():
                sequence.finish(FinishReason.ERROR, ShuttingDown())
            self._wake.notify()
        if self._embedder:
            self._embedder.close()
        self._thread.join(timeout)

    def _check_room(self) -> None:
        if self._closing:
            raise ShuttingDown()
        # one that has ended has room for the next, whose client may ask before the engine comes round to retiring it
        if sum(sequence.finished is None for sequence in list(self._live.values())) >= self.capacity:
            raise Overloaded(
                f"服务器正忙：已有 {self.capacity} 个请求在处理或排队，请稍后再试。",
                f"The server is busy: {self.capacity} requests are running or waiting; try again shortly.",
            )

    def _check(self, request: GenerationRequest) -> None:
        family = self._model.family
        self._check_ids(request.prompt_ids, "prompt")
        self._check_ids(request.params.logit_bias, "logit_bias")
        if request.tools and not family.takes_tools:
            raise BadRequest(
                f"模型 {self.model_name} 不会调用工具；能调用工具的是 ChatGLM3。",
                f"The model {self.model_name} cannot call tools; ChatGLM3 can.",
                param="tools",
            )
        if request.tool_choice and request.answer_prefix:
            raise BadRequest(
                "回答的开头已经给定，不能再要求它以调用工具开始：去掉 tool_choice 或最后一条 assistant 消息。",
                "An answer whose beginning is given cannot begin with a tool call: leave out tool_choice or the last "
                "assistant message.",
                param="tool_choice",
            )
        if request.params.prompt_logprobs is not None and not family.causal_prompt:
            raise BadRequest(
                f"模型 {self.model_name} 双向读取提问，提问里的 token 没有概率。",
                f"The model {self.model_name} reads prompts in both directions: their tokens have no probabilities.",
                param="logprobs",
            )

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        vocab = self._model.network.vocab_size
        if any(not 0 <= i < vocab for i in ids):
            raise BadRequest(
                f"{param} 里有超出词表的 token id，允许的范围是 0 到 {vocab - 1}。",
                f"{param} has a token id outside the vocabulary; 0 to {vocab - 1} are allowed.",
                param=param,
            )

    def _sequence(self, request: GenerationRequest, prompt_ids: list[int]) -> Sequence:
        family, tokenizer, params = self._model.family, self._model.tokenizer, request.params
        answer_limit = None if params.max_tokens is None else len(prompt_ids) + params.max_tokens
        limits = (self.max_length, params.max_length, answer_limit)
        sequence = Sequence(
            f"req-{uuid.uuid4().hex[:16]}",
            prompt_ids,
            params,
            self._stop_ids,
            min(limit for limit in limits if limit is not None),
            client=request.client,
            context=self._model.network.context(prompt_ids),
            openings=family.call_openings(tokenizer, request.tool_choice) if request.tool_choice else None,
        )
        if self._speculates:
            sequence.drafter = Drafter(PromptLookup(sequence.token_ids), self._stop_ids)
        return sequence

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
            while not (self._arrived or self._closing or self._forget or self._scheduler.unfinished):
                self._wake.wait()
            arrived, self._arrived = self._arrived, []
            forget, self._forget = self._forget, False
        if forget:
            self._slots.forget()
            torch.cuda.empty_cache()  # does nothing where CUDA is not in use
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
    drafter = sequence.drafter
    log.info(
        "%s: prompt %d (%d cached), answer %d tokens, %.1f tokens/s, %s%s",
        sequence.request_id,
        sequence.num_prompt,
        sequence.num_cached,
        answer,
        (answer - 1) / seconds if answer > 1 and seconds > 0 else 0.0,
        sequence.finished.reason.value,
        f", {drafter.kept} of {drafter.drafted} drafted tokens kept" if drafter and drafter.drafted else "",
    )

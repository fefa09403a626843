"""Vectors of texts: a BERT-like sentence model, read by transformers on first use, on a thread of its own."""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from server.core import Embeddings
from server.errors import GenerationFailed, Overloaded, ServerError, ShuttingDown, Unavailable
from server.models.pieces import without_surrogates

log = logging.getLogger(__name__)

MAX_TOKENS = 256  # of a text, special tokens included: text2vec's limit
BATCH_TOKENS = 512  # of a batch, padding included: more is no faster on a CPU, and the others wait longer
TEXTS_PER_TURN = 256  # tokenized before another request has its turn
POLL = 0.5  # seconds between looks whether a client that waits has left
LONG_TEXT = 16 * MAX_TOKENS  # characters; of longer texts only the beginning is tokenized

Tokens = dict[str, list[int]]  # one text's input_ids, attention_mask and the like
T = TypeVar("T")


class Embedder:
    """Means of the last hidden states over the attention mask, as text2vec makes them: float32 and not normalised.

    Every piece of work, a batch or the loading, takes its turn in the thread's queue, and a request asks for its next
    batch when it has the last one: a long list delays a short one by a batch. ``find`` gives the model's folder or
    raises ServerError; it may take minutes, is called in the thread on first use, and again if loading failed.
    ``capacity`` requests are held at once, ``threads`` of the CPU compute.
    """

    def __init__(self, name: str, find: Callable[[], Path], *, threads: int = 1, capacity: int = 16):
        self.name = name
        self._find = find
        self._capacity = capacity
        self._room = threading.BoundedSemaphore(capacity)
        self._lock = threading.Lock()
        self._loading: Future[SentenceModel] | None = None  # guarded by the lock
        self._closed: Future[None] = Future()  # an event that can be waited for together with a result
        self._turns: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="embedder", daemon=True)
        self._thread.start()
        self._limit_threads(threads)

    def embed(self, texts: Sequence[str], gone: Callable[[], bool] = lambda: False) -> Embeddings:
        """Raises Unavailable without a model, Overloaded with too many requests, GenerationFailed for this one.

        Goes no further when ``gone()``: a client that did not want to wait may come again with the same texts.
        """
        if not self._room.acquire(blocking=False):
            raise self._overloaded()
        try:
            model = self._wait(self._model(), gone)
            return self._embed(model, texts, gone)
        except ServerError:
            raise
        except Exception as error:
            log.exception("embedding %d texts failed", len(texts))
            raise GenerationFailed(
                "计算句向量时出现内部错误，详情见程序窗口的日志；其他请求不受影响，可以重试。",
                "An internal error ended this request for embeddings (details are in the server's log); other requests "
                "go on, try again.",
            ) from error
        finally:
            self._room.release()

    def close(self, timeout: float | None = 1.0) -> None:
        """End every request at once and the thread after the layer in hand; a download does not keep anybody here."""
        with self._lock:
            if not self._closed.done():
                self._closed.set_result(None)
        self._turns.put(None)
        self._thread.join(timeout)

    def _embed(self, model: SentenceModel, texts: Sequence[str], gone: Callable[[], bool]) -> Embeddings:
        tokens: list[Tokens] = []
        for start in range(0, len(texts), TEXTS_PER_TURN):
            tokens += self._run(model.tokenize, texts[start : start + TEXTS_PER_TURN])
        lengths = [len(one["input_ids"]) for one in tokens]
        vectors: dict[int, array[float]] = {}
        for rows in batches(lengths):
            if gone():
                raise _left()
            vectors.update(zip(rows, self._run(model.encode, [tokens[row] for row in rows]), strict=True))
        return Embeddings(tuple(vectors[row] for row in range(len(texts))), sum(lengths))

    def _model(self) -> Future[SentenceModel]:
        """The loading that is under way or done; a new one if the last one failed."""
        with self._lock:
            if self._loading is None or (self._loading.done() and self._loading.exception()):
                self._loading = self._put(self._load)
            return self._loading

    def _load(self) -> SentenceModel:
        log.info(
            "the sentence model %s is being loaded, after a download if it is not there; a client that gives up "
            "waiting can ask again later",
            self.name,
        )
        try:
            folder = self._find()
        except ServerError as error:
            raise _unavailable(error.zh, error.en) from error
        try:
            model = SentenceModel(folder, self._closed)
        except Exception as error:
            log.debug("the sentence model in %s cannot be loaded", folder, exc_info=error)
            first_line = str(error).strip().partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"
            raise _unavailable(
                f"文件夹 {folder} 里的不能作为句向量模型加载（{reason}），请换一个或重新下载。",
                f"What is in {folder} cannot be loaded as a sentence model ({reason}): put another one there, or "
                "download it again.",
            ) from error
        log.info("the sentence model %s is ready", folder)
        return model

    def _overloaded(self) -> Overloaded:
        loading = self._loading
        if loading and not loading.done():
            return Overloaded(
                f"句向量模型 {self.name} 还在下载或加载，已有 {self._capacity} 个请求在等：请过几分钟再试。",
                f"The sentence model {self.name} is still being downloaded or loaded, and {self._capacity} requests "
                "wait for it: try again in a few minutes.",
                retry_after=60,
            )
        return Overloaded(
            f"句向量请求太多：已有 {self._capacity} 个在处理或排队，请稍后再试。",
            f"Too many requests for embeddings: {self._capacity} are running or waiting; try again shortly.",
        )

    def _limit_threads(self, count: int) -> None:
        """Chat computes at the same time: this thread must not take every core, nor lower the number for others."""
        default = torch.get_num_threads()
        self._run(_set_threads, count)
        torch.set_num_threads(default)  # what threads begin with that have not computed yet

    def _run(self, function: Callable[..., T], *args: object) -> T:
        return self._wait(self._put(function, *args))

    def _put(self, function: Callable[..., T], *args: object) -> Future[T]:
        future: Future[T] = Future()

        def turn() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:  # whatever it is, somebody waits for it
                future.set_exception(error)

        self._turns.put(turn)
        return future

    def _wait(self, future: Future[T], gone: Callable[[], bool] = lambda: False) -> T:
        while not wait((future, self._closed), POLL, return_when=FIRST_COMPLETED).done:
            if gone():
                raise _left()
        if self._closed.done():
            raise ShuttingDown()
        return future.result()

    def _loop(self) -> None:
        while (turn := self._turns.get()) and not self._closed.done():
            turn()


class SentenceModel:
    """A folder's tokenizer and network, used by one thread; ``closed`` ends what is computed with ShuttingDown.

    Anything that transformers raises may come out of it.
    """

    def __init__(self, folder: Path, closed: Future[None]):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores are for chat
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as messages

        messages.set_verbosity_error()
        messages.disable_progress_bar()
        local = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        self._network, report = AutoModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **local
        )
        # the pooler is not used, and many sentence models were saved without one
        if absent := sorted(name for name in report["missing_keys"] if "pooler" not in name):
            raise ValueError(f"the weights lack {absent[0]}, {len(absent)} tensors in all")
        positions = getattr(self._network.config, "max_position_embeddings", MAX_TOKENS)
        self._max_tokens = min(MAX_TOKENS, self._tokenizer.model_max_length, positions)

        def stop_if_closed(*_: object) -> None:
            if closed.done():
                raise ShuttingDown()

        # a batch may take seconds, and Python's exit aborts if a thread of torch's is still computing
        for module in self._network.modules():
            module.register_forward_pre_hook(stop_if_closed)
        self.encode(self.tokenize(["?"]))  # what fails here is no sentence model

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Cut at MAX_TOKENS, or at what the model knows if that is less."""
        encoded = self._tokenizer(
            [self._beginning(without_surrogates(text)) for text in texts],
            truncation=True,
            max_length=self._max_tokens,
            return_attention_mask=True,
        )
        return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    @torch.inference_mode()
    def encode(self, tokens: Sequence[Tokens]) -> list[array[float]]:
        # on the right, where padding shifts no position
        batch = self._tokenizer.pad(list(tokens), padding_side="right", return_tensors="pt")
        hidden = self._network(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        means = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return [array("f", row.tobytes()) for row in means.numpy()]

    def _beginning(self, text: str) -> str:
        """As much of a text as has all the tokens that are read: a whole book would take seconds and gigabytes.

        Twice the tokens, because the end of what was cut off may be tokenized differently.
        """
        size = LONG_TEXT
        while size < len(text):
            if len(self._tokenizer(text[:size])["input_ids"]) >= 2 * MAX_TOKENS:
                return text[:size]
            size *= 4
        return text


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts by their indices, the longest first, in groups of at most BATCH_TOKENS with padding, or of one text."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        end = start + max(1, BATCH_TOKENS // max(1, lengths[order[start]]))
        yield order[start:end]
        start = end


def _set_threads(count: int) -> None:
    torch.get_num_threads()  # sets up this thread, which would otherwise happen later and undo the next line
    torch.set_num_threads(count)


def _left() -> GenerationFailed:
    return GenerationFailed("客户端已离开。", "The client has left.")


def _unavailable(zh: str, en: str) -> Unavailable:
    return Unavailable(
        f"没有可用的句向量模型：{zh}也可以用 --embedding-model 指定一个句向量模型的文件夹。下一次请求会再试。",
        f"There is no sentence model to compute with. {en} Or name a sentence model's folder with --embedding-model. "
        "The next request tries again.",
    )

"""Computes one step: from scheduled work to drawn tokens."""

from __future__ import annotations

import logging

import torch

from server.engine.kv_cache import KVCache
from server.engine.logprobs import score
from server.engine.sampler import Sampler
from server.engine.scheduler import Work
from server.errors import GenerationFailed, ServerError
from server.models.base import ForwardBatch, Network, Segment

log = logging.getLogger(__name__)


class ModelRunner:
    """Owns the network and the cache; used by the engine's thread alone."""

    def __init__(self, network: Network, cache: KVCache, device: torch.device | str):
        self._network = network
        self._cache = cache
        self._device = device
        self._sampler = Sampler()

    @torch.inference_mode()
    def run(self, work: list[Work]) -> list[int | ServerError | None]:
        """One result per piece of work: a drawn id, None where more of the prompt is to come, or what went wrong.

        A failure of the whole batch (out of memory, say) is traced to its sequence by running each one alone, so that
        only the guilty request ends. Running a piece twice is harmless: it writes the same places of the cache.
        """
        try:
            return self._run(work)
        except Exception as error:
            if len(work) == 1:
                log.exception("request %s failed", work[0].sequence.request_id)
                return [_failure(error)]
        return [result for piece in work for result in self.run([piece])]

    def _run(self, work: list[Work]) -> list[int | ServerError | None]:
        token_ids, segments, last_rows, scored_rows, row = [], [], [], [], 0
        for piece in work:
            sequence, start = piece.sequence, piece.sequence.num_computed
            token_ids += sequence.token_ids[start : start + piece.length]
            segments.append(Segment(sequence.slot, start, piece.length, sequence.context))
            scored_rows += range(row, row + piece.scored)
            row += piece.length
            last_rows += [row - 1] * piece.draws
        batch = ForwardBatch(
            torch.tensor(token_ids, device=self._device),
            segments,
            torch.tensor(last_rows + scored_rows, dtype=torch.int64, device=self._device),
        )
        logits = self._network.forward(batch, self._cache)
        _score_prompts(logits[len(last_rows) :], work)
        return self._draw(logits[: len(last_rows)], work)

    def _draw(self, logits: torch.Tensor, work: list[Work]) -> list[int | ServerError | None]:
        sequences = [piece.sequence for piece in work if piece.draws]
        drawn = self._sampler.sample(logits, sequences)
        for row, sequence, result in zip(logits, sequences, drawn, strict=True):
            if sequence.params.logprobs is not None and isinstance(result, int):
                position = len(sequence.token_ids)
                sequence.scores[position] = score(row[None], [result], sequence.params.logprobs)[0]
        results = iter(drawn)
        return [next(results) if piece.draws else None for piece in work]


def _score_prompts(logits: torch.Tensor, work: list[Work]) -> None:
    """``logits`` [R, vocab]: the rows of all pieces of work whose tokens predict others of a prompt."""
    begin = 0
    for piece in work:
        sequence, count = piece.sequence, piece.scored
        if count:
            first = sequence.num_computed + 1
            rows, begin = logits[begin : begin + count], begin + count
            found = score(rows, sequence.token_ids[first : first + count], sequence.params.prompt_logprobs)
            sequence.scores |= dict(enumerate(found, first))


def _failure(error: Exception) -> ServerError:
    if isinstance(error, ServerError):
        return error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        return GenerationFailed(
            "内存或显存不足，这个回答无法继续；请缩短对话，或用更小的 --max-length、--slots 重新启动。",
            "Out of memory while generating: shorten the conversation, or restart with a smaller --max-length or "
            "--slots.",
        )
    return GenerationFailed(
        "生成这个回答时出现内部错误，详情见程序窗口的日志；其他请求不受影响，可以重试。",
        "An internal error ended this answer (details are in the server's log); other requests go on, try again.",
    )

"""Computes one step: from scheduled work to drawn tokens."""

from __future__ import annotations

import logging

import torch

from server.engine.kv_cache import KVCache
from server.engine.logprobs import score
from server.engine.sampler import Sampler
from server.engine.scheduler import Work
from server.engine.sequence import Drawn
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
    def run(self, work: list[Work]) -> list[Drawn]:
        """One result per piece of work.

        A failure of the whole batch (out of memory, say) is traced to its sequence by running each one alone, without
        its draft, so that only the guilty request ends, and where it would have without drafts. Running a piece twice
        is harmless: it writes the same places of the cache, and draws with the same noise.
        """
        generators = [piece.sequence.generator for piece in work]
        noise = [generator.get_state() for generator in generators]
        try:
            return self._run(work)
        except Exception as error:
            if len(work) == 1 and not work[0].draft:
                log.exception("request %s failed", work[0].sequence.request_id)
                return [Drawn([], _failure(error))]
        for generator, state in zip(generators, noise, strict=True):
            generator.set_state(state)
        return [result for piece in work for result in self.run([piece._replace(draft=())])]

    def _run(self, work: list[Work]) -> list[Drawn]:
        token_ids, segments, drawn_rows, scored_rows, row = [], [], [], [], 0
        for piece in work:
            sequence, start = piece.sequence, piece.sequence.num_computed
            token_ids += [*sequence.token_ids[start : start + piece.length], *piece.draft]
            segments.append(Segment(sequence.slot, start, piece.rows, sequence.context))
            scored_rows += range(row, row + piece.scored)
            row += piece.rows
            if piece.draws:
                drawn_rows += range(row - 1 - len(piece.draft), row)
        batch = ForwardBatch(
            torch.tensor(token_ids, device=self._device),
            segments,
            torch.tensor(drawn_rows + scored_rows, dtype=torch.int64, device=self._device),
        )
        logits = self._network.forward(batch, self._cache)
        _score_prompts(logits[len(drawn_rows) :], work)
        return self._draw(logits[: len(drawn_rows)], work)

    def _draw(self, logits: torch.Tensor, work: list[Work]) -> list[Drawn]:
        """``logits`` [R, vocab]: for each piece that draws its last pending token's row and those of its draft."""
        drawing = [piece for piece in work if piece.draws]
        results = self._sampler.sample(logits, [p.sequence for p in drawing], [p.draft for p in drawing])
        rows = logits.split([1 + len(piece.draft) for piece in drawing])
        for piece, piece_rows, (ids, _) in zip(drawing, rows, results, strict=True):
            top, position = piece.sequence.params.logprobs, len(piece.sequence.token_ids)
            if top is not None and ids:
                piece.sequence.scores |= dict(enumerate(score(piece_rows[: len(ids)], ids, top), position))
        remaining = iter(results)
        return [next(remaining) if piece.draws else Drawn([]) for piece in work]


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
            "内存或显存不足，这个回答无法继续；请缩短对话，或用更小的 --max-length、--slots、--keep 重新启动。",
            "Out of memory while generating: shorten the conversation, or restart with a smaller --max-length, "
            "--slots or --keep.",
        )
    return GenerationFailed(
        "生成这个回答时出现内部错误，详情见程序窗口的日志；其他请求不受影响，可以重试。",
        "An internal error ended this answer (details are in the server's log); other requests go on, try again.",
    )

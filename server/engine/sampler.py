"""From logits to the next token, by each sequence's own SamplingParams."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence as Ids

import torch

from server.core import SamplingParams
from server.engine.sequence import Drawn, Sequence
from server.errors import GenerationFailed, ServerError

# candidates looked at before the whole vocabulary is sorted for top_p; they nearly always hold the needed mass
_NUCLEUS_GUESS = 1024
# below this a division by the temperature overflows; the result is the likeliest id anyway
_GREEDY_BELOW = 1e-4


class Sampler:
    """Draws a token per row, as long as they are those that were drafted.

    Every token is drawn as if nothing had been drafted: from the same distribution, with the noise that is next in the
    sequence's generator. The draft only decides whether the next row was computed behind the right tokens. For a draft
    without probabilities this is the rejection sampling of Leviathan et al., https://arxiv.org/abs/2211.17192.
    """

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], drafts: list[Ids[int]] | None = None
    ) -> list[Drawn]:
        """``logits`` float32 [R, vocab]: for each sequence a row, and one behind each id of its draft.

        A row that cannot be drawn from ends its own sequence with an error.
        """
        if not sequences:
            return []
        healthy = torch.isfinite(logits).all(dim=-1).tolist()
        best = logits.argmax(dim=-1).tolist()
        rows = zip(logits, healthy, best, strict=True)
        drafts = drafts or [()] * len(sequences)
        return [
            self._follow(draft, list(itertools.islice(rows, 1 + len(draft))), sequence)
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]

    def _follow(self, draft: Ids[int], rows: list[tuple[torch.Tensor, bool, int]], sequence: Sequence) -> Drawn:
        drawn: list[int] = []
        for (row, healthy, best), guess in itertools.zip_longest(rows, draft):
            if not healthy:
                return Drawn(drawn, _not_finite())
            drawn.append(self._draw(row, sequence, drawn, best))
            if drawn[-1] != guess:
                break
        return Drawn(drawn)

    def _draw(self, row: torch.Tensor, sequence: Sequence, drawn: Ids[int], best: int) -> int:
        params = sequence.params
        adjusted = adjust(row, sequence, drawn)
        if adjusted is not row:
            row, best = adjusted, int(adjusted.argmax())
        if params.temperature < _GREEDY_BELOW or params.top_k == 1:
            return best
        ids, probabilities = distribution(row, params)
        # As torch.multinomial draws, but each id of the vocabulary has its own noise: which other candidates there are,
        # and in which order, then cannot change the choice. On the CPU, so that a seed means the same on every device.
        noise = torch.empty(row.shape[0]).exponential_(generator=sequence.generator)
        ids = ids.cpu()
        return int(ids[(probabilities.cpu() / noise[ids]).argmax()])


def adjust(row: torch.Tensor, sequence: Sequence, drawn: Ids[int] = ()) -> torch.Tensor:
    """One row of logits [vocab] with bias and penalties, and -inf for what would break an opening; else ``row``.

    ``drawn``: what this step has drawn for the sequence already.
    """
    params = sequence.params
    if params.logit_bias:
        ids, values = sequence.bias
        row = row.index_add(0, ids.to(row.device), values.to(row))
    if params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        row = penalize(row, params, [*sequence.token_ids, *drawn], sequence.num_prompt)
    if (allowed := sequence.allowed_ids(drawn)) is not None:
        ids = torch.tensor(allowed, device=row.device)
        row = torch.full_like(row, -torch.inf).index_copy(0, ids, row[ids])
    return row


def penalize(row: torch.Tensor, params: SamplingParams, token_ids: list[int], num_prompt: int) -> torch.Tensor:
    """Apply the three penalties to one row of logits [vocab].

    Repetition as in transformers' RepetitionPenaltyLogitsProcessor (over prompt and answer), presence and frequency as
    OpenAI defines them (over the answer).
    """
    row = row.clone()
    seen = torch.tensor(sorted(set(token_ids)), device=row.device)
    scores = row[seen]
    row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    counts = Counter(token_ids[num_prompt:])
    if counts:
        ids = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= params.presence_penalty + params.frequency_penalty * times
    return row


def distribution(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that may be drawn and their probabilities, both [candidates].

    temperature, then top_k, then top_p: the smallest set of likeliest ids whose sum reaches p, at least one, as
    transformers' warpers do.
    """
    scores = row.float() / params.temperature
    vocab = scores.shape[0]
    keep = min(params.top_k, vocab) if params.top_k else vocab
    if keep == vocab and params.top_p >= 1:
        return torch.arange(vocab, device=row.device), torch.softmax(scores, dim=-1)
    total = scores.logsumexp(dim=-1) if keep == vocab else None
    ids, probabilities = _likeliest(scores, min(keep, _NUCLEUS_GUESS) if total is not None else keep, total)
    if total is not None and probabilities.sum() < params.top_p:
        ids, probabilities = _likeliest(scores, vocab, total)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        count = max(1, int((before < params.top_p).sum()))
        ids, probabilities = ids[:count], probabilities[:count]
    return ids, probabilities / probabilities.sum()


def _likeliest(scores: torch.Tensor, count: int, total: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` likeliest ids and their probabilities, among themselves or of the ``total`` log mass."""
    values, ids = scores.topk(count)
    return ids, (values - (values.logsumexp(dim=-1) if total is None else total)).exp()


def _not_finite() -> ServerError:
    return GenerationFailed(
        "模型算出了无效的数值（NaN 或无穷大），这个回答已停止；模型文件可能已损坏，或该精度不适用，"
        "请检查模型文件或换用 --dtype float32。",
        "The model produced NaN or infinite scores, so this answer was stopped: the model files may be damaged or the "
        "precision unsuitable; check the files or use --dtype float32.",
    )

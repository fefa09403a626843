"""How likely the model found tokens: log probabilities of its own scores, before penalties, bias and temperature."""

from __future__ import annotations

from typing import NamedTuple

import torch

from server.core import TokenLogprob
from server.models.base import Tokenizer


class Score(NamedTuple):
    """A token's log probability, and the likeliest ids in its place with theirs, the best one first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def score(logits: torch.Tensor, token_ids: list[int], top: int) -> list[Score]:
    """For each row of ``logits`` float32 [R, vocab] the token that came, one of ``token_ids`` [R], and ``top`` others.

    The token itself may be among the likeliest.
    """
    scores = logits.log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(top, logits.shape[1]))
    return [
        Score(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(token_ids, chosen, ids.tolist(), values.tolist(), strict=True)
    ]


def readable(tokenizer: Tokenizer, token_id: int, found: Score | None) -> TokenLogprob:
    """A score with what its tokens stand for; without a score for a token that nothing comes before."""
    if found is None:
        return TokenLogprob(token_id, tokenizer.token_bytes(token_id), None)
    top = tuple(TokenLogprob(i, tokenizer.token_bytes(i), logprob) for i, logprob in found.top)
    return TokenLogprob(token_id, tokenizer.token_bytes(token_id), found.logprob, top)

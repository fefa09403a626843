"""One request as the engine's thread sees it: token ids, where they are in the cache, and when to end."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from server.core import FinishReason, SamplingParams
from server.engine.logprobs import Score
from server.errors import ServerError
from server.models.base import Context

if TYPE_CHECKING:
    from server.engine.speculation import Drafter


@dataclass(frozen=True)
class Finish:
    """The last event of a sequence."""

    reason: FinishReason
    error: ServerError | None = None


class Drawn(NamedTuple):
    """What a step drew for a sequence, in order, and what went wrong behind that; nothing while its prompt is read.

    All but the last id had been drafted; with an error all of them.
    """

    token_ids: list[int]
    error: ServerError | None = None


class Sequence:
    """Prompt and answer of one request.

    ``token_ids`` grows by what every step draws; the first ``num_computed`` of them are in the cache. What is not yet
    computed is the rest of the prompt, or the one token drawn last: reading and generating are the same thing.
    ``events`` is what the request's own thread reads: token ids, then one Finish. ``scores`` by position in
    ``token_ids``, of those whose log probabilities were asked for; a token's is there before its event. ``openings``:
    the answer must begin with one of these lists of ids. ``bias``: the ids and values of the logit bias. ``drafter``
    says what may come next; None where nothing is to be drafted.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_total: int,
        client: str = "",
        context: Context | None = None,
        openings: list[list[int]] | None = None,
    ):
        self.request_id = request_id
        self.client = client
        self.params = params
        self.stop_ids = stop_ids
        self.max_total = max_total
        self.context = context
        self.openings = openings or []
        # made once: a request may name a thousand ids
        self.bias = (torch.tensor(list(params.logit_bias)), torch.tensor(list(params.logit_bias.values())))
        self.scores: dict[int, Score] = {}
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.slot: int | None = None
        self.drafter: Drafter | None = None
        self.finished: Finish | None = None
        self.events: queue.SimpleQueue[int | Finish] = queue.SimpleQueue()
        # its own generator: the same seed draws the same numbers whatever else is running
        self.generator = torch.Generator().manual_seed(random.getrandbits(63) if params.seed is None else params.seed)
        self.submitted = time.monotonic()
        self.first_token: float | None = None

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def room(self) -> int:
        """How many tokens more the sequence may get."""
        return self.max_total - len(self.token_ids)

    @property
    def answer_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def allowed_ids(self, drawn: Ids[int] = ()) -> list[int] | None:
        """The ids that the token behind ``drawn`` must be one of, while an opening is to be kept; None for any."""
        done = [*self.answer_ids, *drawn] if self.openings else []
        fitting = [opening for opening in self.openings if opening[: len(done)] == done]
        return sorted({opening[len(done)] for opening in fitting if len(opening) > len(done)}) or None

    def append(self, token_id: int) -> None:
        """Take the next token that was drawn and decide whether it was the last."""
        if self.room <= 0:  # nothing but the prompt's scores was wanted
            self.finish(FinishReason.LENGTH)
            return
        if self.first_token is None:
            self.first_token = time.monotonic()
        if token_id in self.stop_ids:
            self.finish(FinishReason.STOP)
            return
        self.token_ids.append(token_id)
        self.events.put(token_id)
        if self.room <= 0:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason, error: ServerError | None = None) -> None:
        """End the sequence; the reader learns it at once, the engine frees the slot before its next step.

        From any thread. Where two threads end it at the same moment, the reader takes the first event.
        """
        if self.finished is None:
            self.finished = Finish(reason, error)
            self.events.put(self.finished)

"""Speculative decoding: tokens per step and tokens per second with and without, and what a row more costs.

    python -m benchmarks.speculation --model demo
    python -m benchmarks.speculation --random chatglm2-6b --dtype bfloat16     # writes 12.5 GB of random weights once

Every option of the server itself works too. Four tables:

1. rows: how long a step of several rows takes, to set ROW_COST in server/engine/speculation.py by.
2. replayed: tokens per step if a model gave the answers of benchmarks/repeating_texts.py; no network computes.
3. the model's own greedy continuations of the same prompts, with prompt lookup and without, in alternation.
4. a proposer that is told each id of the answer with probability p, on a prompt of random ids.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.random_model import CONFIGS, ROOT, make_random_model
from benchmarks.repeating_texts import TEXTS
from benchmarks.serving import Prompts
from benchmarks.stamps import drawn, note_tokens
from server.assembly import build_engine, prepare
from server.config import parse
from server.core import GenerationRequest, SamplingParams
from server.engine import local
from server.engine.kv_cache import KVCache
from server.engine.local import LocalEngine
from server.engine.speculation import MOST_ROWS, Draft, Drafter, PromptLookup, Proposer, allot
from server.models.base import ForwardBatch, Segment

MakeProposer = Callable[[list[int]], Proposer]  # from a prompt's ids, which the answer's come behind


class Silent:
    """Proposes nothing: decoding without speculation, in an engine that has it."""

    def __init__(self, token_ids: list[int]):
        pass

    def propose(self, most: int) -> Draft:
        return Draft([], 0)


class Told:
    """Knows the answer that ``token_ids``, now a prompt, will get, and proposes each id of it with probability p."""

    def __init__(self, token_ids: list[int], answer: list[int], p: float):
        self._ids, self._begin = token_ids, len(token_ids)
        self._answer, self._p = answer, p
        self._random = random.Random(0)

    def propose(self, most: int) -> Draft:
        at = len(self._ids) - self._begin
        ids = self._answer[at : at + most]
        return Draft([i if self._random.random() < self._p else max(1, i - 1) for i in ids], 0)


@dataclass(frozen=True)
class Run:
    """One answer; ``rate`` in tokens per second while decoding."""

    token_ids: list[int]
    rate: float
    drafted: int
    kept: int

    @property
    def per_step(self) -> float:
        return len(self.token_ids) / max(1, len(self.token_ids) - self.kept)


def answer(engine: LocalEngine, prompt_ids: list[int], new_tokens: int, proposer: MakeProposer) -> Run:
    """Greedy, with whatever ``proposer`` makes of the prompt's ids."""
    local.PromptLookup = proposer
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    stream = engine.submit(GenerationRequest(prompt_ids=tuple(prompt_ids), params=params))
    ids = [i for output in stream for i in output.token_ids]
    stamps, drafter = drawn[stream.request_id], stream._sequence.drafter
    return Run(ids, (len(ids) - 1) / max(1e-9, stamps[-1] - stamps[0]), drafter.drafted, drafter.kept)


def step_times(engine: LocalEngine, context: int, repeat: int) -> None:
    """Steps of 1 and more rows behind ``context`` tokens, in alternation; the first round warms up."""
    cache, counts = _filled_cache(engine, context), [1, 2, 4, 8, MOST_ROWS]
    prompt = engine._model.network.context(_prompt(engine, context))
    rounds = [
        [_step(engine, cache, Segment(0, context, rows, prompt)) for rows in counts] for _ in range(repeat + 1)
    ]
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
    print(f"\nsteps behind {context} tokens, medians of {repeat}\n")
    print("| rows | ms | a row more, as a share of a step of one |\n|---|---|---|")
    for rows, middle in zip(counts, medians, strict=True):
        more = f"{(middle / medians[0] - 1) / (rows - 1):.3f}" if rows > 1 else ""
        print(f"| {rows} | {1000 * middle:.1f} | {more} |", flush=True)


def _filled_cache(engine: LocalEngine, context: int) -> KVCache:
    """One slot; zeros behind it, because what happens to be in the memory may be slow to compute with."""
    model, shape = engine._model, engine._model.network.kv_shape
    cache = KVCache(shape, 1, context + MOST_ROWS, model.kv_dtype, model.device, model.prefix)
    zeros = torch.zeros(context, shape.groups, shape.head_dim, dtype=model.kv_dtype, device=model.device)
    for layer in range(shape.layers):
        cache.update(layer, Segment(0, 0, context), zeros, zeros)
    return cache


@torch.inference_mode()
def _step(engine: LocalEngine, cache: KVCache, segment: Segment) -> float:
    """Seconds, logits included."""
    device = engine._model.device
    ids, wanted = torch.full((segment.length,), 300, device=device), torch.arange(segment.length, device=device)
    begin = time.perf_counter()
    engine._model.network.forward(ForwardBatch(ids, [segment], wanted), cache).sum().item()
    return time.perf_counter() - begin


def replay(engine: LocalEngine) -> None:
    """What speculation does with given answers, by what a row costs."""
    costs = [0.02, 0.1, 0.25]
    print("\nreplayed: tokens per step (and per time) by what a row more costs\n")
    print("| text | answer tokens | " + " | ".join(map(str, costs)) + " |\n|---|---|" + "---|" * len(costs))
    for name, prompt, reply in TEXTS:
        prompt_ids, reply_ids = (list(engine.tokenize(text).ids) for text in (prompt, reply))
        cells = ["{:.2f} ({:.2f} times)".format(*_replayed(prompt_ids, reply_ids, cost)) for cost in costs]
        print(f"| {name} | {len(reply_ids)} | {' | '.join(cells)} |", flush=True)


def _replayed(prompt_ids: list[int], reply_ids: list[int], cost: float) -> tuple[float, float]:
    """Tokens per step, and tokens per time of a step of one row."""
    ids, end = list(prompt_ids), len(prompt_ids) + len(reply_ids)
    drafter = Drafter(PromptLookup(ids), frozenset())
    steps, elapsed = 0, 0.0
    while len(ids) < end:
        rest = reply_ids[len(ids) - len(prompt_ids) :]
        draft, chance = drafter.propose(min(MOST_ROWS, len(rest)) - 1)
        (count,) = allot([(len(draft), chance)], cost)
        kept = next((at for at in range(count) if draft[at] != rest[at]), count)
        if count:
            drafter.note(count, kept)
        elif draft:
            drafter.skip()
        ids += rest[: kept + 1]
        steps, elapsed = steps + 1, elapsed + 1 + cost * count
    return len(reply_ids) / steps, len(reply_ids) / elapsed


def continuations(engine: LocalEngine, new_tokens: int, repeat: int) -> None:
    """The model's own answers to the raw prompts."""
    print("\n| prompt | tokens/s without | with | drafted | kept | tokens/step |\n|---|---|---|---|---|---|")
    for name, prompt, _ in TEXTS:
        ids = list(engine.tokenize(prompt).prompt_ids)
        _compare(engine, name, ids, new_tokens, repeat, PromptLookup)


def told(engine: LocalEngine, chances: list[float], new_tokens: int, repeat: int) -> None:
    print("\n| p | tokens/s without | with | drafted | kept | tokens/step |\n|---|---|---|---|---|---|")
    prompt_ids = _prompt(engine, 64)
    known = answer(engine, prompt_ids, new_tokens, Silent).token_ids
    for p in chances:
        _compare(engine, f"{p:.2f}", prompt_ids, new_tokens, repeat, lambda ids, p=p: Told(ids, known, p))


def _compare(
    engine: LocalEngine, name: str, prompt_ids: list[int], new_tokens: int, repeat: int, proposer: MakeProposer
) -> None:
    runs = [
        (answer(engine, prompt_ids, new_tokens, Silent), answer(engine, prompt_ids, new_tokens, proposer))
        for _ in range(repeat)
    ]
    without, with_it = (statistics.median(run.rate for run in column) for column in zip(*runs, strict=True))
    plain, last = runs[-1]
    # where two ids are nearly as likely, 16-bit numbers of another number of rows may round to the other one
    differs = "" if plain.token_ids == last.token_ids else ", other ids"
    gain = f"{with_it:.2f} ({with_it / without:.2f} times)"
    print(
        f"| {name}{differs} | {without:.2f} | {gain} | {last.drafted} | {last.kept} | {last.per_step:.2f} |", flush=True
    )


def _prompt(engine: LocalEngine, length: int) -> list[int]:
    """Random ids behind what the family puts in front of every text, or around it."""
    special = list(engine.tokenize("").prompt_ids)
    return Prompts().make(length - len(special)) + special


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=sorted(CONFIGS), help="create and use a random full-size model")
    parser.add_argument("--layers", type=int, help="with --random: fewer layers")
    parser.add_argument("--context", type=int, nargs="+", default=[32, 1024], help="for the table of rows")
    parser.add_argument("--chances", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options, server_options = parser.parse_known_args()
    if options.random:
        folder = ROOT / "THUDM" / f"random-{options.random}{f'-{options.layers}' if options.layers else ''}"
        make_random_model(options.random, folder, options.layers)
        server_options = ["--model", str(folder), *server_options]
    config = parse(server_options)
    folder, profile = prepare(config)
    engine = build_engine(config, folder, profile)
    print(f"{folder.name}: {profile.bits} bits, {profile.dtype}, {profile.device}, {profile.threads} threads")
    note_tokens()
    for context in options.context:
        step_times(engine, context, options.repeat)
    replay(engine)
    continuations(engine, options.new_tokens, options.repeat)
    told(engine, options.chances, options.new_tokens, options.repeat)
    engine.close()


if __name__ == "__main__":
    main()

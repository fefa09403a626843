"""Time to first token, tokens per second for 1, 4 and 8 clients, and what prefix reuse saves; medians of repetitions.

    python -m benchmarks.serving --model demo
    python -m benchmarks.serving --random chatglm2-6b --dtype bfloat16     # writes 12.5 GB of random weights once

Every option of the server itself works too (--profile, -q, --threads ...). The clients are threads that read the
engine's streams, without HTTP between.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from dataclasses import dataclass

from benchmarks.random_model import CONFIGS, ROOT, make_random_model
from benchmarks.stamps import drawn, note_tokens
from server.assembly import build_engine, prepare
from server.config import parse
from server.core import GenerationRequest, SamplingParams
from server.engine.local import LocalEngine


@dataclass(frozen=True)
class Timing:
    """One answer: seconds from the start to each token, and the request's own counts."""

    stamps: list[float]
    cached_tokens: int
    begin: float

    @property
    def first(self) -> float:
        return self.stamps[0] - self.begin


def read_answer(engine: LocalEngine, prompt_ids: list[int], new_tokens: int) -> Timing:
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    begin = time.perf_counter()
    stream = engine.submit(GenerationRequest(prompt_ids=tuple(prompt_ids), params=params))
    *_, last = stream
    return Timing(drawn[stream.request_id], last.usage.cached_tokens, begin)


class Prompts:
    """Random prompts that share no prefix, from ids that every vocabulary has."""

    def __init__(self):
        self._random = random.Random(0)

    def make(self, length: int) -> list[int]:
        return [self._random.randrange(300, 1500) for _ in range(length)]


def first_token(engine: LocalEngine, prompts: Prompts, lengths: list[int], repeat: int) -> None:
    print("\n| prompt tokens | first token, s (median; min-max) | prompt tokens/s |\n|---|---|---|")
    for length in lengths:
        times = [read_answer(engine, prompts.make(length), 1).first for _ in range(repeat)]
        middle = statistics.median(times)
        print(f"| {length} | {middle:.3f} ({min(times):.3f}-{max(times):.3f}) | {length / middle:.1f} |", flush=True)


def clients(engine: LocalEngine, prompts: Prompts, counts: list[int], new_tokens: int, repeat: int) -> None:
    print("\n| clients | tokens/s together | tokens/s each, while decoding | first token, s |\n|---|---|---|---|")
    for count in counts:
        rows = [_together(engine, [prompts.make(32) for _ in range(count)], new_tokens) for _ in range(repeat)]
        together, each, first = (statistics.median(column) for column in zip(*rows, strict=True))
        spread = [row[0] for row in rows]
        print(
            f"| {count} | {together:.2f} ({min(spread):.2f}-{max(spread):.2f}) | {each:.2f} | {first:.3f} |", flush=True
        )


def _together(engine: LocalEngine, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, float]:
    timings: list[Timing] = []
    threads = [
        threading.Thread(target=lambda p=prompt: timings.append(read_answer(engine, p, new_tokens)))
        for prompt in prompts
    ]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(len(t.stamps) for t in timings)
    each = [(len(t.stamps) - 1) / (t.stamps[-1] - t.stamps[0]) for t in timings if len(t.stamps) > 1]
    end = max(t.stamps[-1] for t in timings)
    return total / (end - begin), statistics.median(each or [0.0]), statistics.median(t.first for t in timings)


def prefix_reuse(engine: LocalEngine, prompts: Prompts, history: int, repeat: int) -> None:
    """A follow-up question of 32 tokens after ``history`` tokens, with the history in a slot and without."""
    reused, fresh, cached = [], [], 0
    for _ in range(repeat):
        talk = prompts.make(history)
        fresh.append(read_answer(engine, talk + prompts.make(32), 1).first)
        timing = read_answer(engine, talk + prompts.make(32), 1)
        reused.append(timing.first)
        cached = timing.cached_tokens
    with_it, without = statistics.median(reused), statistics.median(fresh)
    print(
        f"\nfollow-up of 32 tokens after {history}: first token after {with_it:.3f} s with prefix reuse "
        f"({cached} tokens cached), {without:.3f} s without: {without / with_it:.1f} times faster"
    )


def alternating(engine: LocalEngine, prompts: Prompts, count: int, history: int) -> None:
    """Follow-up questions of 32 tokens in ``count`` conversations by turns, each after ``history`` tokens."""
    talks = [prompts.make(history) for _ in range(count)]
    first = [read_answer(engine, talk, 1).first for talk in talks]
    timings = [read_answer(engine, talk + prompts.make(32), 1) for talk in talks]
    found = sum(timing.cached_tokens == history for timing in timings)
    print(
        f"\n{count} alternating conversations of {history} tokens: first token of a follow-up after "
        f"{statistics.median(timing.first for timing in timings):.3f} s, of the first questions after "
        f"{statistics.median(first):.3f} s; {found} of {count} found their history"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=sorted(CONFIGS), help="create and use a random full-size model")
    parser.add_argument("--layers", type=int, help="with --random: fewer layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512], help="prompt lengths")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--conversations", type=int, default=12, help="how many alternate")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options, server_options = parser.parse_known_args()
    if options.random:
        folder = ROOT / "THUDM" / f"random-{options.random}{f'-{options.layers}' if options.layers else ''}"
        make_random_model(options.random, folder, options.layers)
        server_options = ["--model", str(folder), *server_options]
    run(options, server_options)


def run(options: argparse.Namespace, server_options: list[str]) -> None:
    config = parse(["--slots", str(max(options.clients)), *server_options])
    folder, profile = prepare(config)
    begin = time.perf_counter()
    engine = build_engine(config, folder, profile)
    print(
        f"{folder.name}: {profile.bits} bits, {profile.dtype}, {profile.device}, {profile.threads} threads, "
        f"loaded in {time.perf_counter() - begin:.1f} s"
    )
    note_tokens()
    prompts = Prompts()
    read_answer(engine, prompts.make(32), 4)  # warm-up
    lengths = [length for length in options.lengths if length < engine.max_length]
    first_token(engine, prompts, lengths, options.repeat)
    clients(engine, prompts, options.clients, options.new_tokens, options.repeat)
    prefix_reuse(engine, prompts, lengths[-1], options.repeat)
    alternating(engine, prompts, options.conversations, lengths[-1])
    engine.close()


if __name__ == "__main__":
    main()

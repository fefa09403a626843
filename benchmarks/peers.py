"""Our CPU engine beside llama.cpp's, measured alternately in one run; prints Markdown.

    python -m benchmarks.peers --prepare DIR            # llama.cpp's tools, a full-size random model and its GGUF files
    python -m benchmarks.peers --llama DIR --model CHECKPOINT --bits 4 --threads 2 --repeat 5
    python -m benchmarks.peers --llama DIR --model CHECKPOINT --bits 8 --parts engine

``--parts engine``: decoding and prompt reading, our engine in a process of its own against llama-bench. ``--parts
server``: 1, 4 and 8 streaming clients of our server and of llama-server, and the next round of a long conversation.
Before each round the read bandwidth is measured. Each cell is the median of the rounds, in brackets the smallest and
the largest; the last column is that of each round's ratio. Only one side computes at a time; what anybody else, the
resting side included, took of the machine meanwhile is said below each table. Other options go to our server (--dtype
...). Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.bandwidth import probe
from benchmarks.figures import Figure, Measurement, Side, digits, spread, table
from benchmarks.llama_cpp import FORMATS, prepare
from benchmarks.peer_engines import LlamaBench, OurEngine
from server.config import ROOT, ROWS
from server.errors import ServerError, StartupError
from server.i18n import system_language


def rounds(measurements: Iterable[Measurement], options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Measure everything ``repeat`` times; GB/s of the probe before each round, and others' shares of the machine."""
    probes, disturbance = [], []
    for index in range(options.repeat):
        probes.append(probe(options.threads))
        for measurement in measurements:
            measurement.run(index, disturbance)
    return probes, disturbance


def engine_part(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        peer = LlamaBench(options.llama, options.model, options.bits, options.threads)
        ours = stack.enter_context(contextlib.closing(OurEngine(["--model", str(options.model), *_served(options, 1)])))
        measurements = _engine_measurements(options, [ours, peer])
        probes, disturbance = rounds(measurements, options)
        _print(options, "engine", measurements, _memory(ours, peer), disturbance)
        _print_limits(options, ours, peer, measurements, probes)


def _engine_measurements(options: argparse.Namespace, sides: list[Side]) -> list[Measurement]:
    count, depth, prompt = options.new_tokens, options.context, options.prompt

    def decoding(context: int) -> Measurement:
        title = f"decoding {count} tokens at context {context:,}, tokens/s"
        return Measurement([title], sides, lambda side, seed: [side.decode(context, count, seed)])

    reading = f"reading a prompt of {prompt} tokens, tokens/s"
    return [
        decoding(0),
        Measurement([reading], sides, lambda side, seed: [side.read_prompt(prompt, seed)]),
        decoding(depth),
    ]


def server_part(options: argparse.Namespace) -> None:
    from benchmarks.peer_servers import LlamaServer, OurServer

    slots = max(options.clients)
    with contextlib.ExitStack() as stack:
        peer = LlamaServer(options.llama, options.bits, options.threads, slots, _max_length(options))
        stack.callback(peer.close)
        ours = stack.enter_context(contextlib.closing(OurServer(options.model, _served(options, slots))))
        measurements = _server_measurements(options, [ours, peer])
        probes, disturbance = rounds(measurements, options)
        _print(options, "server", measurements, _memory(ours, peer), disturbance)
        print(f"\nRead bandwidth before each round: {spread(probes)} GB/s.", flush=True)


def _server_measurements(options: argparse.Namespace, sides: list[Side]) -> list[Measurement]:
    def clients(count: int) -> Measurement:
        who = f"{count} client{'s' if count > 1 else ''}"
        return Measurement(
            [f"{who}, tokens/s together", f"{who}, seconds to the first token"], sides,
            lambda side, seed: side.together(count, options.client_prompt, options.new_tokens, seed),
        )  # fmt: skip

    titles = ["a conversation's first round of {:,} tokens, seconds to the first token",
              "its next round of {1} tokens, seconds to the first token", "the next round's time / the first's"]
    talk = Measurement(
        [title.format(options.history, options.client_prompt) for title in titles], sides[:1],
        lambda side, seed: side.follow_up(options.history, options.client_prompt, seed),
    )  # fmt: skip
    return [*map(clients, options.clients), talk]


def _max_length(options: argparse.Namespace) -> int:
    return max(options.context, options.prompt, options.history) + options.client_prompt + options.new_tokens + 64


def _served(options: argparse.Namespace, slots: int) -> list[str]:
    """Options of our server. Random text says nothing about speculation, so it is off where there is any."""
    speculate = ["--speculate", "0"] if "speculate" in ROWS else []
    return ["-q", str(options.bits), "--device", "cpu", "--threads", str(options.threads), "--slots", str(slots),
            "--max-length", str(_max_length(options)), *speculate, *options.server_options]  # fmt: skip


def _memory(ours: Side, peer: Side) -> Figure:
    return Figure("resident at the peak, GB", [ours.peak() / 1e9], [peer.peak() / 1e9])


def _print(
    options: argparse.Namespace, part: str, measurements: list[Measurement], memory: Figure, disturbance: list[float]
) -> None:
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    figures = [figure for measurement in measurements for figure in measurement.figures]
    peer = f"llama.cpp {FORMATS[options.bits]}"
    print(f"\n{table(f'{part}, int{options.bits}, {threads}', peer, [*figures, memory])}")
    print(f"\nThe rest of the machine, the resting side included, took {100 * statistics.median(disturbance):.1f}% of "
          f"all processors (at most {100 * max(disturbance):.1f}%).", flush=True)  # fmt: skip


def _print_limits(
    options: argparse.Namespace, ours: OurEngine, peer: LlamaBench, measurements: list[Measurement], probes: list[float]
) -> None:
    """GB/s beside what the memory gives, and multiply-adds; attention and the KV cache are not counted."""
    decoding, reading = (measurement.figures[0] for measurement in measurements[:2])
    print(f"\nRead bandwidth before each round: {spread(probes)} GB/s. With the weights that a token reads:\n")
    print("| | GB per token | decoding, GB/s | share of the bandwidth | decoding, GMAC/s | prompt, GMAC/s |")
    print("|---|---|---|---|---|---|")
    names = {"ours": ours.cost, f"llama.cpp {FORMATS[options.bits]}": peer.cost}
    speeds = zip((decoding.ours, decoding.peer), (reading.ours, reading.peer), strict=True)
    for (name, (size, macs)), (decoded, read) in zip(names.items(), speeds, strict=True):
        read_gb = [speed * size / 1e9 for speed in decoded]
        shares = [speed / limit for speed, limit in zip(read_gb, probes, strict=True)]
        cells = [digits(size / 1e9), spread(read_gb), spread(shares),
                 *(spread([speed * macs / 1e9 for speed in column]) for column in (decoded, read))]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


PARTS = {"engine": engine_part, "server": server_part}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="build llama.cpp and write the GGUF files into DIR")
    parser.add_argument("--llama", type=Path, metavar="DIR", help="where --prepare put them")
    parser.add_argument("--model", type=Path, help="a ChatGLM2 checkpoint; --prepare makes a random one without it")
    parser.add_argument("--bits", type=int, choices=sorted(FORMATS), default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="tokens before decoding, beside 0")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is read")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--client-prompt", type=int, default=32, help="tokens of the clients' prompts")
    parser.add_argument("--history", type=int, default=1000, help="tokens of the conversation that goes on")
    options, options.server_options = parser.parse_known_args(argv)
    if not options.prepare and not (options.llama and options.model):
        parser.error("give --llama DIR and --model CHECKPOINT, or --prepare DIR")
    return options


def run(options: argparse.Namespace) -> None:
    if options.prepare:
        if not options.model:
            from benchmarks.random_model import make_random_model

            options.model = ROOT / "THUDM" / "random-chatglm2-6b"
            make_random_model("chatglm2-6b", options.model)
        prepare(options.prepare, options.model)
        print(f"python -m benchmarks.peers --llama {options.prepare} --model {options.model}")
        return
    if not (options.model / "config.json").is_file():
        raise StartupError(f"{options.model} 不是模型文件夹：里面没有 config.json。",
                           f"{options.model} is no model folder: it has no config.json.", param="model")
    options.model = options.model.resolve()
    for part in options.parts:
        PARTS[part](options)


def main() -> None:
    try:
        run(parse())
    except ServerError as error:
        sys.exit(error.text(system_language()))


if __name__ == "__main__":
    main()

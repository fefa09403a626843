"""From typing the command to the first answer, and what is resident then, as Markdown.

    python -m benchmarks.startup --model demo
    python -m benchmarks.startup --model THUDM/random-chatglm2-6b -q 4

``python -m server`` in a process of its own, and one request over HTTP for one token. Other options go to the server.
One more start comes first and is not counted: it may quantize the model. Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import peak_bytes, spread
from tests.functional.program import Program

LOADING = 1800  # seconds


class Start(NamedTuple):
    """Seconds since the command was typed; GB."""

    ready: float
    answered: float
    resident: float
    peak: float


def start(model: str, server_options: list[str]) -> Start:
    begin = time.perf_counter()
    program = Program(*server_options, model=model, wait=False)
    try:
        program.port = int(program.wait_for(r"ready: http://127\.0\.0\.1:(\d+)", LOADING)[1])
        ready = time.perf_counter() - begin
        body = {"prompt": "你好", "max_tokens": 1, "temperature": 0}
        json.loads(program.post("/v1/completions", body).read())["choices"]
        answered = time.perf_counter() - begin
        pid = program.process.pid
        return Start(ready, answered, _resident(pid) / 1e9, peak_bytes(pid) / 1e9)
    finally:
        program.stop()


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeat", type=int, default=5)
    options, server_options = parser.parse_known_args()
    start(options.model, server_options)
    starts = [start(options.model, server_options) for _ in range(options.repeat)]
    print("| seconds until it is ready | until the first token over HTTP | resident, GB | at the peak, GB |")
    print("|---|---|---|---|")
    print("| " + " | ".join(spread(list(column)) for column in zip(*starts, strict=True)) + " |")


if __name__ == "__main__":
    main()

"""What watching a folder costs while nothing happens, and how long a request file waits for its answer.

    python -m benchmarks.spool [--seconds 20] [--old 20000]

CPU time of the whole process (the demo model, ``--spool`` beside HTTP), with an empty folder and with ``--old`` answers
that nobody took away; then answers of one short question each, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from tests.functional.program import Program


def idle(process: psutil.Process, seconds: float) -> float:
    """Per cent of one core."""
    time.sleep(3)  # what the last change in the folder set off is over
    begin, before = time.perf_counter(), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    return 100 * (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - begin)


def answer_time(requests: Path, name: str) -> float:
    """Seconds from the request's appearance to the answer's, the settling time included."""
    part = requests / f".{name}"
    part.write_text("你好", encoding="utf-8")
    begin = time.perf_counter()
    part.rename(requests / f"{name}.request")
    while not (requests / f"{name}.back").exists():
        time.sleep(0.002)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--old", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Program("--spool", folder) as program:
        requests, process = Path(folder, "requests"), psutil.Process(program.process.pid)
        print(f"idle, empty folder: {idle(process, options.seconds):.2f}% of a core")
        times = [answer_time(requests, f"q{i}") for i in range(10)]
        print(f"answer after {statistics.median(times):.2f} s ({min(times):.2f}-{max(times):.2f})")
        for i in range(options.old):
            (requests / f"old{i}.back").write_bytes(b"answer")
        print(f"idle, {options.old} old answers: {idle(process, options.seconds):.2f}% of a core")


if __name__ == "__main__":
    main()

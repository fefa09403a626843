"""How fast this machine reads memory: a sum over 2 GiB, the limit of decoding, which reads every weight per token.

    python -m benchmarks.bandwidth [--threads 2]          (prints GB/s, the median of 15 sums)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BYTES = 2 * 2**30  # far more than any cache holds


def probe(threads: int) -> float:
    """GB/s, measured in a process of its own: its 2 GiB must not count as anybody's memory."""
    command = [sys.executable, "-m", "benchmarks.bandwidth", "--threads", str(threads)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def measure(threads: int, repeat: int = 15) -> float:
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(BYTES // 4)
    values.sum()
    speeds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        values.sum()
        speeds.append(BYTES / (time.perf_counter() - begin) / 1e9)
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    print(f"{measure(parser.parse_args().threads):.2f}")


if __name__ == "__main__":
    main()

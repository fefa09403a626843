"""How far bfloat16 and float16 are from float32, as Markdown: logits and the next token's distribution.

    python -m benchmarks.accuracy [--oracle DIR]          (default: ../shared/oracle, where it is there)

All prompts of the reference checkpoints in tests/data/reference and DIR/models, whose stored float32 logits are those
of other implementations. Differences of logits are in units of their standard deviation (root mean square, and the
largest), KL is the mean divergence of the next token's distribution in nats. "official": the official code's own half
precision, where it is stored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tests.models.half_precision import DTYPES, Distance, official_distance, our_distance, prompts
from tests.models.reference import Reference, load_reference, reference_folders
from tests.oracle import ORACLE

HEAD = [f"{dtype} {what}" for dtype in DTYPES for what in ("rms", "largest", "KL")]


def row(title: list[str], distances: list[Distance]) -> str:
    cells = [f"{d.rms:.4f} | {d.largest:.3f} | {d.kl:.1e}" for d in distances]
    return "| " + " | ".join([*title, *cells]) + " |"


def rows(ref: Reference) -> list[str]:
    """One line for a folder, and one for the official code's half precision if that is known."""
    dtypes = DTYPES.values()
    title = [ref.folder.name, ref.generation, ref.precision]
    lines = [row(title, [our_distance(ref, dtype) for dtype in dtypes])]
    official = [official_distance(ref, dtype) for dtype in dtypes]
    if all(official):
        lines.append(row([ref.folder.name, ref.generation, "official"], official))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", type=Path, default=ORACLE, help="a folder with more references in DIR/models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| " + " | ".join(["model", "generation", "weights", *HEAD]) + " |")
    print("|---|---|---|" + "---|" * len(HEAD))
    for folder in reference_folders(args.oracle):
        if prompts(ref := load_reference(folder)):
            print(*rows(ref), sep="\n", flush=True)


if __name__ == "__main__":
    main()

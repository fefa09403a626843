"""What quantized formats cost: bits per weight, relative error of the weights and of products with them.

    python -m benchmarks.formats

Random weights, normally distributed and heavy-tailed (each value times e^normal), 1024 x 4096 of each, and 64 rows of
normally distributed x. Formats: 16 values in even steps or in the table of kernels/quantize.py, groups of 32, 64 or
128, scales in float16 or as 8-bit multiples of the row's largest / 127; next to llama.cpp's rules Q4_0 and Q8_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from server.kernels.quantize import GROUP_SIZE, INT4_TABLE, quantize
from server.kernels.torch_ops import dequantize

EVEN_STEPS = torch.arange(-8, 8)
# scales that are tried, as shares of the one that maps the largest value to the table's end
SHARES = [0.7 + 0.065 * i for i in range(8)]


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp's quantize_row_q4_0_ref, there and back: scale = value of largest magnitude / -8 in float16."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    codes = (groups / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15) - 8
    return (codes * scale.half().float()).flatten(1)


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp's quantize_row_q8_0_ref, there and back: scale = max|w| / 127 in float16."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / torch.where(scale == 0, 1, scale)).round()
    return (codes * scale.half().float()).flatten(1)


def four_bits(weight: torch.Tensor, values: torch.Tensor, group: int, *, row_scales: bool) -> torch.Tensor:
    """There and back: each group at the best of several scales, values at the nearest place."""
    values = values.float()
    borders = (values[1:] + values[:-1]) / 2
    groups = weight.unflatten(1, (-1, group))
    whole = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / values[0]
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in SHARES:
        near = values[torch.bucketize(groups / (whole * share), borders)]
        scale = (groups * near).sum(-1, keepdim=True) / near.square().sum(-1, keepdim=True)
        error = (groups - scale * near).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    if row_scales:
        unit = best.abs().amax(1, keepdim=True) / 127
        best = (best / unit).round() * unit
    else:
        best = best.half().float()
    codes = torch.bucketize(groups / torch.where(best == 0, torch.inf, best), borders)
    return (values[codes] * best).flatten(1)


def ours(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return dequantize(quantize(weight, bits), torch.float32)


def formats(columns: int) -> Iterator[tuple[str, float, Callable[[torch.Tensor], torch.Tensor]]]:
    """(name, bits per weight in rows of so many columns, there and back)."""
    yield "llama.cpp Q4_0", 4.5, q4_0
    for name, values in (("even steps", EVEN_STEPS), ("table", INT4_TABLE)):
        for group in (32, 64, 128):
            for row_scales in (False, True):
                bits = 4 + (8 / group + 32 / columns if row_scales else 16 / group)
                kind = "int8" if row_scales else "float16"

                def there_and_back(weight, values=values, group=group, row_scales=row_scales):
                    return four_bits(weight, values, group, row_scales=row_scales)

                yield f"{name}, groups of {group}, {kind} scales", bits, there_and_back
    yield "**int4 here**", 4 + 8 / GROUP_SIZE[4] + 32 / columns, lambda weight: ours(weight, 4)
    yield "llama.cpp Q8_0", 8.5, q8_0
    yield "**int8 here**", 8 + 16 / GROUP_SIZE[8], lambda weight: ours(weight, 8)


def main() -> None:
    torch.manual_seed(1)
    normal, x = torch.randn(1024, 4096), torch.randn(64, 4096)
    weights = {"normal": normal, "heavy tails": normal * torch.randn(1024, 4096).exp()}
    print("| format | bits per weight | " + " | ".join(f"{name}: W | W·x" for name in weights) + " |")
    print("|---|---|" + "---|" * 2 * len(weights))
    for name, bits, there_and_back in formats(4096):
        cells = []
        for weight in weights.values():
            back, product = there_and_back(weight), x @ weight.T
            cells += [(back - weight).norm() / weight.norm(), (x @ back.T - product).norm() / product.norm()]
        print(f"| {name} | {bits:.3f} | " + " | ".join(f"{cell:.5f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Figures that two sides are measured for in turn, and the Markdown they become."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil


class Side(Protocol):
    """Who is measured; ``pid`` is its process, or None where each measurement is a child process that ends with it."""

    pid: int | None

    def peak(self) -> int:
        """Bytes resident at the peak."""


@dataclass
class Figure:
    """One line of a table; ``ours`` and ``peer`` hold a value per round, ``peer`` none where only we are measured."""

    title: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)

    def row(self) -> str:
        peer, ratio = "", ""
        if self.peer:
            # of each round: what the machine does changes between rounds
            ratios = [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
            peer, ratio = spread(self.peer), spread(ratios)
        return f"| {self.title} | {spread(self.ours)} | {peer} | {ratio} |"


class Measurement:
    """``measure(side, seed)`` returns one value per title. The seed is the same for both sides of a round."""

    def __init__(
        self, titles: Sequence[str], sides: Sequence[Side], measure: Callable[[Any, str], Sequence[float]]
    ):
        self.figures = [Figure(title) for title in titles]
        self._sides = [(sides[0], "ours"), *((side, "peer") for side in sides[1:])]
        self._measure = measure

    def run(self, index: int, disturbance: list[float]) -> None:
        """Measure each side once, in turn the one or the other first; adds what others took of the machine."""
        for side, name in self._sides if index % 2 == 0 else reversed(self._sides):
            watch = Watch(side.pid)
            values = self._measure(side, f"{self.figures[0].title} {index}")
            disturbance.append(watch.others())
            for figure, value in zip(self.figures, values, strict=True):
                getattr(figure, name).append(value)
                print(f"round {index + 1}: {figure.title}: {name} {digits(value)}", file=sys.stderr, flush=True)


class Watch:
    """What others than this process, its ended children and ``pid`` take of the machine, from now on.

    The side that is not measured counts as others, so one that does not rest shows.
    """

    def __init__(self, pid: int | None):
        self._process = psutil.Process(pid) if pid else None
        self._begin = self._read()

    def _read(self) -> tuple[float, float, float]:
        machine = psutil.cpu_times()
        busy = sum(getattr(machine, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
        own = sum(os.times()[:4])
        if self._process:
            own += sum(self._process.cpu_times()[:2])
        return time.perf_counter(), busy, own

    def others(self) -> float:
        """Between 0 and 1, which is all processors."""
        seconds, busy, own = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return max(0.0, (busy - own) / (seconds * psutil.cpu_count()))


def peak_bytes(pid: int) -> int:
    """VmHWM, the most memory that a process has had resident so far; 0 for one that has ended (Linux only)."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, places)}f}"


def spread(values: Sequence[float]) -> str:
    """The median, and in brackets the smallest and the largest where there are several."""
    middle = digits(statistics.median(values))
    return f"{middle} ({digits(min(values))}-{digits(max(values))})" if len(values) > 1 else middle


def table(title: str, peer: str, figures: Sequence[Figure]) -> str:
    head = f"| {title} | ours | {peer} | ours / {peer} |\n|---|---|---|---|\n"
    return head + "\n".join(figure.row() for figure in figures)

"""How far a download is: a bar in a terminal, now and then a line anywhere else."""

from __future__ import annotations

import collections
import sys
import time
from typing import Any

_LINE_SECONDS = 10.0  # between two lines where there is no bar
_SPEED_SECONDS = 30.0  # the speed is that of so long
_STEP_SECONDS = 0.5  # between two points that it is taken from


def readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"


class Progress:
    """Counts bytes up to ``total``, of which ``there`` need no work, and shows speed and time left."""

    def __init__(self, total: int, there: int, *, zh: bool):
        from tqdm import tqdm

        self.zh = zh
        self._total = total
        self._done = there
        self._steps: collections.deque[tuple[float, int]] = collections.deque([(time.monotonic(), there)])
        self._shown = time.monotonic()
        # without a description, which would push speed and time left out of a window of 80 columns
        self._bar = tqdm(total=total, initial=there, unit="B", unit_scale=True, dynamic_ncols=True, smoothing=0.05,
                         disable=not (total and sys.stderr.isatty()), leave=False)  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def say(self, zh: str, en: str) -> None:
        """A line beside the bar."""
        self._bar.write(zh if self.zh else en, file=sys.stdout)
        sys.stdout.flush()

    def advance(self, size: int) -> None:
        """``size`` bytes more, or less, where a piece turns out to be of no use."""
        self._done += size
        self._bar.update(size)
        now = time.monotonic()
        if len(self._steps) > 1 and now - self._steps[-2][0] < _STEP_SECONDS:
            self._steps.pop()
        self._steps.append((now, self._done))
        while len(self._steps) > 2 and now - self._steps[0][0] > _SPEED_SECONDS:
            self._steps.popleft()
        if self._bar.disable and now - self._shown > _LINE_SECONDS:
            self._shown = now
            print(self._line(), flush=True)

    def _line(self) -> str:
        (began, first), (now, last) = self._steps[0], self._steps[-1]
        speed = max(0.0, last - first) / max(now - began, 1e-6)
        parts = [f"{readable(last)} / {readable(self._total)} ({last / max(self._total, 1):.0%})"]
        parts.append(f"{speed / 1e6:.1f} MB/s")
        if speed:
            parts.append(self._time((self._total - last) / speed))
        return "  " + ("，" if self.zh else ", ").join(parts)

    def _time(self, seconds: float) -> str:
        if seconds < 90:
            return f"还要约 {seconds:.0f} 秒" if self.zh else f"about {seconds:.0f} s left"
        return f"还要约 {seconds / 60:.0f} 分钟" if self.zh else f"about {seconds / 60:.0f} min left"

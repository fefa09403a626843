"""When each token was drawn, noted in the engine itself: text may wait for its other half, the clock must not."""

from __future__ import annotations

import time

from server.engine.sequence import Sequence

drawn: dict[str, list[float]] = {}  # request id -> perf_counter() of its tokens


def note_tokens(step: float = 0.0) -> None:
    """From now on fill ``drawn``; ``step`` seconds are slept before each token, as a larger model would compute."""
    append = Sequence.append

    def noting(self: Sequence, token_id: int) -> None:
        time.sleep(step)
        drawn.setdefault(self.request_id, []).append(time.perf_counter())
        append(self, token_id)

    Sequence.append = noting

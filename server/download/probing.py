"""Which sources answer, what they have, and how fast each of them is from here."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.download import web
from server.download.folder import Repositories
from server.download.sources import Listing, RemoteFile, Source, absent, find_listing, title
from server.download.web import SourceError
from server.errors import StartupError

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

PROBE_BYTES = 2 * 2**20


@dataclass(eq=False)
class Supplier:
    """A source that has the model, and how it has behaved so far."""

    source: Source
    listing: Listing
    speed: float = 0.0  # bytes per second; 0: not measured
    failures: int = 0  # one after the other, since it last gave a good piece
    not_before: float = 0.0  # time.monotonic() from which on it may be asked again
    dropped: set[str] = field(default_factory=set)  # files that it is not asked for any more
    reasons: dict[str, SourceError] = field(default_factory=dict)  # its last failure for each file


Answer = tuple[Source, "Supplier | SourceError | StartupError"]


def find_suppliers(
    sources: Sequence[Source],
    repositories: Repositories,
    client: httpx2.Client,
    largest: Callable[[Listing], RemoteFile | None],
    stop: threading.Event,
) -> tuple[list[Supplier], list[tuple[Source, SourceError]]]:
    """The sources that have the model, the fastest first, and why the others do not give it.

    All are asked at the same time. Where there are several, a piece of the file that ``largest`` picks is fetched from
    each: what cannot give a piece, or is too slow to be waited for, comes last.
    """
    asked = [source for source in sources if source.names(repositories)]
    if not asked:
        return [], [(source, absent()) for source in sources]
    answers: queue.Queue[Answer] = queue.Queue()
    listed: dict[Source, Supplier] = {}
    for source in asked:
        arguments = (source, repositories, client, largest if len(asked) > 1 else None, listed, answers)
        threading.Thread(target=_ask, args=arguments, name="probe", daemon=True).start()
    found: list[Supplier] = []
    failed: list[tuple[Source, SourceError]] = []
    deadline = time.monotonic() + 3 * web.PATIENCE.longest  # for answers that drip and never end
    while len(found) + len(failed) < len(asked) and not stop.is_set():
        if time.monotonic() > deadline:
            silent = [s for s in asked if s not in [a.source for a in found] and s not in [f for f, _ in failed]]
            found += [listed[source] for source in silent if source in listed]
            failed += [(source, SourceError("没有应答", "no answer")) for source in silent if source not in listed]
            break
        try:
            source, answer = answers.get(timeout=0.2)
        except queue.Empty:
            continue
        if isinstance(answer, StartupError):
            raise answer
        if isinstance(answer, SourceError):
            failed.append((source, answer))
        else:
            found.append(answer)
            deadline = min(deadline, time.monotonic() + web.PATIENCE.grace)
    return sorted(found, key=lambda supplier: (-supplier.speed, asked.index(supplier.source))), failed


def _ask(
    source: Source,
    repositories: Repositories,
    client: httpx2.Client,
    largest: Callable[[Listing], RemoteFile | None] | None,
    listed: dict[Source, Supplier],
    answers: queue.Queue[Answer],
) -> None:
    try:
        listed[source] = supplier = Supplier(source, find_listing(source, client, repositories))
        if largest and (file := largest(supplier.listing)):
            supplier.speed = _measure(supplier, file, client)
        answers.put((source, supplier))
    except (SourceError, StartupError) as error:
        answers.put((source, error))
    except Exception:  # whoever answers too late finds the client closed, which raises what it likes
        log.debug("measuring %s", title(source), exc_info=True)
        answers.put((source, web.unreachable()))


def _measure(supplier: Supplier, file: RemoteFile, client: httpx2.Client) -> float:
    """Bytes per second of a piece from the middle of the file, which no cache on the way is likely to have at hand."""
    start = max(0, file.size // 2 - PROBE_BYTES // 2)
    end = min(file.size, start + PROBE_BYTES)
    url, headers = supplier.source.address(supplier.listing, file.name), supplier.source.headers()
    began, got = time.monotonic(), 0
    try:
        with web.open_range(client, url, headers, start, file.size, end) as body, web.as_source_errors():
            if body.skip:
                return 0.0  # it ignores ranges, so every new connection would begin with what is there
            for chunk in body.chunks():
                got += len(chunk)
                if got >= end - start or time.monotonic() - began > web.PATIENCE.probe:
                    break
    except SourceError as error:
        if error.status in (401, 403, 404):
            raise  # it lists the model, but does not give it
        return 0.0
    return got / max(time.monotonic() - began, 1e-6)

"""One file on its way into a folder: ``NAME.part`` until its hash is right, then ``NAME``.

A part is gone on with at the byte that it has reached, after a stop of the program as well, and from whichever source
gives it best.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from server.download import web
from server.download.check import Stopped, hash_file
from server.download.plan import Wanted
from server.download.probing import Supplier
from server.download.progress import Progress, readable
from server.download.sources import title
from server.download.web import SourceError

if TYPE_CHECKING:
    import httpx2

_GOOD_PIECE = 2**20  # bytes after which a source's earlier failures are forgiven


class Exhausted(Exception):
    """No source gives the file; what each did is in the suppliers' ``reasons``."""


def part_of(folder: Path, name: str) -> Path:
    """Where the beginning of a file is kept."""
    return folder / f"{name}.part"


def is_of_use(size: int, wanted: Wanted) -> bool:
    """Whether a part of ``size`` bytes may be the beginning of a file; without a hash nobody could tell."""
    return wanted.sha256 is not None and size <= wanted.size


class Transfer:
    """Fetches one file; ``run`` may be called once."""

    def __init__(
        self, wanted: Wanted, folder: Path, client: httpx2.Client, progress: Progress, stop: threading.Event
    ):
        self._wanted = wanted
        self._folder = folder
        self._client = client
        self._progress = progress
        self._stop = stop
        self._last: Supplier | None = None  # who was asked last
        self._givers: set[str] = set()  # whose bytes the part has, "" for those of an earlier run
        self._mixed = wanted.sha256 is not None  # whether a part may have pieces of several sources
        for supplier in wanted.suppliers:
            supplier.failures = int(supplier.failures > 1)  # a new chance; behind the others, if it failed often

    def run(self) -> str:
        """SHA-256 of the file, which is then in its place.

        Raises Exhausted, Stopped, and OSError where the file cannot be written; what is there is kept.
        """
        part = part_of(self._folder, self._wanted.name)
        with part.open("ab") as file:
            self._take_up(part, file)
            while self._at < self._wanted.size or not self._is_right(file):
                if self._at < self._wanted.size:
                    supplier = self._pick()
                    try:
                        self._receive(supplier, file)
                    except SourceError as error:
                        self._note(supplier, error)
            file.flush()
            os.fsync(file.fileno())
            written = os.fstat(file.fileno()).st_size
        if written != self._wanted.size:  # where locks do not work, another program may have written too
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(part))
        os.replace(part, self._folder / self._wanted.name)
        return self._sha.hexdigest()

    def _take_up(self, part: Path, file: IO[bytes]) -> None:
        self._sha, self._at = hashlib.sha256(), 0
        size = part.stat().st_size
        if not is_of_use(size, self._wanted):
            file.truncate(0)
        elif size:
            self._progress.say(f"  检查已有的 {readable(size)}", f"  checking the {readable(size)} that are there")
            self._sha, self._at = hash_file(part, self._stop, lambda _: None), size
            self._givers.add("")

    def _restart(self, file: IO[bytes]) -> None:
        self._progress.advance(-self._at)
        file.truncate(0)
        self._sha, self._at = hashlib.sha256(), 0
        self._givers.clear()

    def _pick(self) -> Supplier:
        """Who is asked next; waits where everybody wants a pause."""
        suppliers, now = self._wanted.suppliers, time.monotonic()
        usable = self._usable()
        if not usable:
            raise Exhausted

        def order(supplier: Supplier) -> tuple:
            changes = not self._mixed and bool(self._at) and supplier is not self._last
            return changes, max(0.0, supplier.not_before - now), supplier.failures, suppliers.index(supplier)

        best = min(usable, key=order)
        wait = best.not_before - now
        if wait > 2:
            source, why = title(best.source), best.reasons.get(self._wanted.name, web.unreachable())
            self._progress.say(f"  {source} {why.zh}：等 {wait:.0f} 秒再试",
                               f"  {source} {why.en}: trying again in {wait:.0f} s")  # fmt: skip
        if self._stop.wait(max(0.0, wait)):
            raise Stopped
        return best

    def _usable(self) -> list[Supplier]:
        limit = len(web.PATIENCE.retries)
        return [s for s in self._wanted.suppliers if self._wanted.name not in s.dropped and s.failures <= limit]

    def _receive(self, supplier: Supplier, file: IO[bytes]) -> None:
        """Write what the supplier gives, up to the end of the file. Raises SourceError where it ends before."""
        wanted, good = self._wanted, self._at + _GOOD_PIECE
        if supplier is not self._last:
            self._change_to(supplier, file)
        began, counted = time.monotonic(), 0
        url, headers = supplier.source.address(supplier.listing, wanted.name), supplier.source.headers()
        with web.open_range(self._client, url, headers, self._at, wanted.size) as body:
            for chunk in body.chunks():
                if self._stop.is_set():
                    raise Stopped
                if self._at + len(chunk) > wanted.size:
                    raise SourceError("给的比文件还长", "gives more than the file has", lasting=True)
                file.write(chunk)
                self._givers.add(supplier.source.base)
                self._sha.update(chunk)
                self._at += len(chunk)
                self._progress.advance(len(chunk))
                if self._at >= good:
                    supplier.failures = 0
                if time.monotonic() - began > web.PATIENCE.window:
                    received = body.received()
                    if received - counted < web.PATIENCE.slowest * web.PATIENCE.window and len(self._usable()) > 1:
                        raise web.stalled()
                    began, counted = time.monotonic(), received
        if self._at < wanted.size:
            raise web.unreachable()
        supplier.failures = 0

    def _change_to(self, supplier: Supplier, file: IO[bytes]) -> None:
        if self._last:
            if not self._mixed:
                self._restart(file)
            before, now, at = title(self._last.source), title(supplier.source), readable(self._at)
            if why := self._last.reasons.get(self._wanted.name):
                self._progress.say(f"  {before} {why.zh}：从 {at} 处起改由 {now} 下载",
                                   f"  {before} {why.en}: going on at {at} from {now}")  # fmt: skip
        self._last = supplier

    def _note(self, supplier: Supplier, error: SourceError) -> None:
        """Remember a failure: for how long, or that it is no use to ask again."""
        name, retries = self._wanted.name, web.PATIENCE.retries
        supplier.reasons[name] = error
        if error.lasting:
            supplier.dropped.add(name)
            return
        wait = retries[min(supplier.failures, len(retries) - 1)] if error.wait is None else error.wait
        supplier.failures += 1
        supplier.not_before = time.monotonic() + wait
        if wait > web.PATIENCE.longest:
            supplier.dropped.add(name)

    def _is_right(self, file: IO[bytes]) -> bool:
        """Compare the hash; of a wrong file nothing is kept, and its source is not asked again, if it was only one."""
        if self._wanted.sha256 in (None, self._sha.hexdigest()):
            return True
        wrong = SourceError("的文件内容不对", "has a file with other contents", lasting=True)
        guilty = [s for s in self._wanted.suppliers if {s.source.base} == self._givers]
        for supplier in guilty:
            self._note(supplier, wrong)
        if not self._givers:
            raise Exhausted  # nobody gave anything: an empty file is expected, with the hash of another one
        if not guilty:
            self._mixed = False  # the next time it will be known who it was
        self._progress.say(f"  {self._wanted.name} 的校验和不对，重新下载",
                           f"  the checksum of {self._wanted.name} is wrong, it is downloaded again")  # fmt: skip
        self._restart(file)
        return False

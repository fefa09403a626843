"""Downloading a model: from the fastest of the sources that have it, what is not there or not right."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from server.config import ROOT
from server.converted import SPARE_BYTES
from server.download import failures, interrupts, web
from server.download.check import Expected, Record, State, Stopped, check_files
from server.download.folder import (
    CHAT,
    INDEXES,
    ModelKind,
    Repositories,
    converted_files,
    incomplete,
    is_published,
    is_superfluous,
    locate,
    missing_files,
    repositories,
)
from server.download.manifest import known_files
from server.download.plan import Wanted, choose_version, is_text, is_weights, largest, make_plan, wanted_files
from server.download.probing import Supplier, find_suppliers
from server.download.progress import Progress, readable
from server.download.sources import Source, choose_sources, find_listing, title
from server.download.transfer import Exhausted, Transfer, is_of_use, part_of
from server.download.web import SourceError
from server.errors import StartupError
from server.file_lock import PRIVATE, try_lock
from server.hardware import disk_free
from server.i18n import system_language

if TYPE_CHECKING:
    import httpx2

_ADOPTED_BYTES = 2**20  # a file that is too short, but so long, is the beginning of the right one, and no error page

Announce = Callable[[int, Source], None]


class Origin(NamedTuple):
    """Where the user wants models from: ``source`` and ``endpoint`` of Config."""

    source: Sequence[str] | None = None
    endpoint: str | None = None

    def sources(self) -> list[Source]:
        return choose_sources(self.source, self.endpoint)


ANY = Origin()


def ensure_model(
    name: str,
    kind: ModelKind = CHAT,
    *,
    origin: Origin = ANY,
    root: Path = ROOT,
    language: str | None = None,
    announce: Announce | None = None,
    thorough: bool = False,
    originals: bool = False,
    converted: int | None = None,
) -> Path:
    """The folder of the model called ``name``, downloaded into ``root``/THUDM if it is not complete.

    A complete folder is taken as it is, without the network, unless the call is ``thorough``: then its files are
    checked as well, any OWNER/MODEL of the hub may be named, and a known model may be completed anywhere. What stands
    for deleted originals is enough unless ``originals`` are asked for. ``announce`` is called before a download, with
    the size of the whole model in bytes and the source that comes first. ``converted``: bytes that will be made of the
    weights before those are deleted, for which the disk must have room too; 0: as many as pickles have. Raises
    StartupError for an unknown name and for every way in which a download fails, ModelError for a folder of the user's
    own that lacks files.
    """
    folder = locate(name, root, kind, foreign=thorough)
    missing = missing_files(folder, kind, originals=originals)
    names = repositories(folder, root, kind, anywhere=thorough)
    if not names and missing:
        raise incomplete(folder, missing, kind)
    if not names or not (missing or thorough):
        return folder
    if origin.source is None and not is_published(folder, kind):
        names = names._replace(modelscope=())
    zh = (language or system_language()) == "zh"
    try:
        interrupts.run(
            lambda stop: _Download(
                folder, kind, names, origin, announce, stop, zh=zh, originals=originals, converted=converted
            ).run()
        )
    except KeyboardInterrupt:
        raise failures.interrupted(folder) from None
    return folder


def download_size(name: str, source: Source, *, root: Path = ROOT) -> int | None:
    """Bytes of a known chat model's files; None if the source does not say."""
    names = repositories(locate(name, root), root)
    try:
        with web.open_client() as client:
            listing = find_listing(source, client, names or Repositories(()))
    except (SourceError, StartupError):
        return None
    return sum(file.size for file in wanted_files(listing.files, CHAT))


class _Download:
    """One run: what is there is checked, what lacks is fetched."""

    def __init__(
        self,
        folder: Path,
        kind: ModelKind,
        names: Repositories,
        origin: Origin,
        announce: Announce | None,
        stop: threading.Event,
        *,
        zh: bool,
        originals: bool,
        converted: int | None,
    ):
        self._folder = folder
        self._kind = kind
        self._names = names
        self._origin = origin
        self._announce = announce
        self._stop = stop
        self._zh = zh
        self._originals = originals
        self._converted = converted
        self._known = known_files(folder.name)
        self._suppliers: list[Supplier] = []  # the best first

    def run(self) -> None:
        with failures.disk_failures(self._folder), web.open_client() as client, contextlib.ExitStack() as stack:
            if self._is_right_without_asking() or not self._find_suppliers(client):
                return
            if stack.enter_context(self._lock()) and self._is_right_without_asking():
                return
            plan = self._plan()
            self._refuse_if_lacking(file.name for file in plan)
            if self._announce:
                self._announce(sum(file.size for file in plan), self._suppliers[0].source)
            wrong = self._wrong({file.name: (file.size, file.sha256) for file in plan})
            left = [file for file in plan if file.name in wrong]
            self._adopt(left)
            self._check_disk(left, plan)
            self._tell(left, len(plan) - len(left))
            self._fetch(left, client)
        if missing := self._missing():
            raise failures.lacks_files(self._folder, missing, [supplier.source for supplier in self._suppliers])

    def _say(self, zh: str, en: str) -> None:
        print(zh if self._zh else en, flush=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """One program at a time writes into the folder; another one waits until it is done, and is told that it did."""
        private = self._folder / PRIVATE
        private.mkdir(parents=True, exist_ok=True)
        with (private / "lock").open("ab") as file:
            waits = False
            while not try_lock(file):
                if not waits:
                    waits = True
                    self._say(f"另一个程序正在往 {self._folder} 里下载，等它完成……",
                              f"Another program is downloading into {self._folder}, waiting for it ...")  # fmt: skip
                if self._stop.wait(0.5):
                    raise Stopped
            yield waits

    def _missing(self) -> list[str]:
        return missing_files(self._folder, self._kind, originals=self._originals)

    def _plan(self) -> list[Wanted]:
        return make_plan(self._suppliers, self._known, self._kind, self._folder, originals=self._originals)

    def _is_right_without_asking(self) -> bool:
        """Whether everything is there, and right by what is known here."""
        if self._missing():
            return False
        record = Record(self._folder)
        ours = [file.path.name for file in converted_files(self._folder)]
        weights = [path.name for path in self._folder.iterdir() if is_weights(path.name) and path.name not in ours]
        expected = {name: (None, record.published(name)) for name in weights}
        known = {name: file for name, file in self._known.items()
                 if not is_superfluous(self._folder, name, originals=self._originals)}  # fmt: skip
        expected |= {name: (file.size, file.sha256) for name, file in known.items()}
        return all(sha256 for _, sha256 in expected.values()) and not self._wrong(expected)

    def _find_suppliers(self, client: httpx2.Client) -> bool:
        """False where nobody answers, and nothing is missing either: what is there then cannot be checked."""
        sources = self._origin.sources()
        if len(sources) > 1:
            self._say("正在比较下载源……", "comparing the sources ...")
        self._suppliers, failed = find_suppliers(
            sources, self._names, client, lambda listing: largest(listing, self._kind), self._stop
        )
        if self._stop.is_set():
            raise Stopped
        for source, error in failed:
            self._say(f"  {title(source)} {error.zh}", f"  {title(source)}: {error.en}")
        if self._suppliers:
            return True
        if self._missing():
            raise failures.nobody_has_it(failed, self._names, self._folder)
        self._say(
            "没有缺文件，但连不上下载源，不知道它们应有的校验和，所以没有核对。",
            "No file is missing, but no source answers that knows their checksums, so they were not checked.",
        )
        return False

    def _wrong(self, expected: Expected) -> list[str]:
        """The files that are not there, or not what they should be."""
        states = check_files(self._folder, expected, self._stop, zh=self._zh)
        return [name for name, state in states.items() if state in (State.ABSENT, State.BROKEN)]

    def _adopt(self, left: Sequence[Wanted]) -> None:
        """A file that a person put there and that broke off early is gone on with; the hash tells if it was wrong."""
        for file in left:
            path, part = self._folder / file.name, part_of(self._folder, file.name)
            there = path.stat().st_size if path.is_file() else 0
            if file.sha256 and not part.exists() and _ADOPTED_BYTES < there < file.size:
                os.replace(path, part)
        for path in (self._folder / ".cache" / "huggingface" / "download").glob("*.incomplete"):
            with contextlib.suppress(OSError):
                path.unlink()  # huggingface_hub, which earlier versions used, would neither use nor remove it

    def _there(self, left: Sequence[Wanted]) -> int:
        """Bytes of parts that are gone on with."""
        parts = [(part_of(self._folder, file.name), file) for file in left]
        sizes = [(part.stat().st_size, file) for part, file in parts if part.is_file()]
        return sum(size for size, file in sizes if is_of_use(size, file))

    def _check_disk(self, left: Sequence[Wanted], plan: Sequence[Wanted]) -> None:
        pickles = sum(file.size for file in plan if file.name.endswith(".bin"))
        converted = pickles if self._converted == 0 else self._converted or 0
        needed = sum(file.size for file in left) - self._there(left) + converted + SPARE_BYTES
        free = disk_free(self._folder)
        if left and needed > free:
            raise failures.disk_full(self._folder, free, needed, converted=converted)

    def _tell(self, left: Sequence[Wanted], done: int) -> None:
        if not left:
            return
        size = readable(sum(file.size for file in left) - self._there(left))
        speeds = [f" ({supplier.speed / 1e6:.1f} MB/s)" if supplier.speed else "" for supplier in self._suppliers]
        where = ", ".join(title(s.source) + speed for s, speed in zip(self._suppliers, speeds, strict=True))
        repository = self._suppliers[0].listing.repository
        self._say(
            f"从 {where} 下载 {repository} 到 {self._folder}：还差 {len(left)} 个文件 {size}（已有 {done} 个）",
            f"Downloading {repository} from {where} to {self._folder}: {len(left)} files, {size} to go ({done} are "
            "there)",
        )

    def _fetch(self, left: Sequence[Wanted], client: httpx2.Client) -> None:
        total = sum(file.size for file in left)
        with Progress(total, self._there(left), zh=self._zh) as progress:
            for number, file in enumerate(left, 1):
                if is_weights(file.name):  # the index is there now, and tells what the model needs
                    self._refuse_if_lacking(rest.name for rest in left[number - 1 :])
                label = f"({number}/{len(left)}) {file.name}  {readable(file.size)}"
                progress.say(label, label)
                sha256 = self._transfer(file, client, progress)
                if not is_text(file.name):
                    Record(self._folder).remember(file.name, sha256)

    def _transfer(self, file: Wanted, client: httpx2.Client, progress: Progress) -> str:
        """SHA-256 of the file, which is fetched from those who agree about it; if they fail, from the others."""
        others = self._suppliers
        while file.suppliers:
            others = [supplier for supplier in others if supplier not in file.suppliers]
            with contextlib.suppress(Exhausted):
                return Transfer(file, self._folder, client, progress, self._stop).run()
            file = choose_version(file.name, others, self._known.get(file.name))
        reasons = [(s.source, s.reasons[file.name]) for s in self._suppliers if file.name in s.reasons]
        raise failures.nobody_gives_it(file.name, reasons, self._folder)

    def _refuse_if_lacking(self, coming: Iterable[str]) -> None:
        """Raises StartupError where the model will lack files in the end, before gigabytes of it are fetched."""
        names = {*coming}
        lacking = [missing for missing in self._missing()
                   if not names & {*missing.split(" or ")} and not self._stands_for(missing, names)]  # fmt: skip
        if lacking:
            raise failures.lacks_files(self._folder, lacking, self._origin.sources())

    def _stands_for(self, missing: str, names: set[str]) -> bool:
        """Whether weights of any name will do, as long as no index says which ones there are."""
        has_index = any((self._folder / index).is_file() for index in INDEXES)
        return not has_index and is_weights(missing.rpartition(" or ")[2]) and any(is_weights(name) for name in names)

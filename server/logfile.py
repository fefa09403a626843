"""server.log beside the program: what bug reports need of earlier starts, and nothing that its users write."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

NAMES = ("server.log", "server.old.log")  # a start begins a new one where the old one is large
_LARGE = 2**20  # bytes
_QUOTING = ("server.api", "server.spool")  # what these tell of may quote a client
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# for what the console shows in another form: why a start failed, and how the program ended
starts = logging.getLogger("server.start")
starts.propagate = False
starts.setLevel(logging.INFO)
starts.addHandler(logging.NullHandler())


class _File(logging.FileHandler):
    """A folder that cannot be written, or a full disk, costs the line and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # of opening the file
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def keep_log(folder: Path) -> logging.Handler:
    """What this program's own modules log goes to ``folder``/server.log too, by the handler that is returned."""
    path, old = (folder / name for name in NAMES)
    with contextlib.suppress(OSError):
        if path.stat().st_size > _LARGE:
            os.replace(path, old)
    file = _File(path, encoding="utf-8", errors="backslashreplace", delay=True)
    file.addFilter(lambda record: record.name.startswith("server.") and not record.name.startswith(_QUOTING))
    file.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(file)
    starts.addHandler(file)
    return file

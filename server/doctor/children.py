"""Looks that may end a whole process, or never end, happen in a process of their own (``child.py``)."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
from typing import Any

from server.config import ROOT

MARK = "doctor: "  # the line of the output that begins with it is the result
_KEPT_LINES = 6
# what Windows ends a process with (NTSTATUS)
_WINDOWS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction",
    0xC0000135: "a DLL was not found",
    0xC0000139: "a DLL lacks a function",
    0xC0000142: "a DLL failed to start",
    0xC0000409: "stack buffer overrun",
}


_running: set[subprocess.Popen[str]] = set()


class ChildFailed(Exception):
    """The look crashed its process or was cut off; the text says how, ``output`` is the end of what it printed."""

    def __init__(self, text: str, output: str = ""):
        super().__init__(text)
        self.output = output


def ask(look: str, seconds: float) -> dict[str, Any]:
    """What a look of ``child.py`` returns; ``{"error": ...}`` where it raised. Raises ChildFailed."""
    command = [sys.executable, *_flags(), "-X", "utf8", "-m", "server.doctor.child", look]
    try:
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, encoding="utf-8", errors="replace")  # fmt: skip
    except OSError as error:
        raise ChildFailed(f"{sys.executable}: {error}") from None
    _running.add(child)
    try:
        output, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise ChildFailed(f"no answer within {seconds:.0f} s") from None
    finally:
        _running.discard(child)
    said = [line for line in output.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and said:
        return json.loads(said[-1].removeprefix(MARK))
    raise ChildFailed(exit_reason(child.returncode), "\n".join((errors or output).strip().splitlines()[-_KEPT_LINES:]))


@atexit.register
def _end_children() -> None:
    """Whom Ctrl+C leaves behind: the threads that wait for them are daemons."""
    for child in list(_running):
        child.kill()


def _flags() -> list[str]:
    """Those of this Python that decide which packages are found."""
    flags = {"-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site, "-S": sys.flags.no_site}
    return [flag for flag, is_set in flags.items() if is_set]


def exit_reason(code: int) -> str:
    """What an exit code means, in words: ``SIGSEGV``, ``0xC0000005 access violation``, ``exit code 3``."""
    if code < 0 and -code in iter(signal.Signals):
        return signal.Signals(-code).name
    unsigned = code & 0xFFFFFFFF
    if unsigned >= 0x80000000:
        return f"0x{unsigned:08X} {_WINDOWS.get(unsigned, '')}".strip()
    return f"exit code {code}"

"""Looks that may end a whole process, or never end, happen in a process of their own (``child.py``)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from server.config import ROOT

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


class ChildFailed(Exception):
    """The look crashed its process or was cut off; the text says how, ``output`` is the end of what it printed."""

    def __init__(self, text: str, output: str = ""):
        super().__init__(text)
        self.output = output


def ask(look: str, seconds: float) -> dict[str, Any]:
    """What a look of ``child.py`` returns; ``{"error": ...}`` where it raised. Raises ChildFailed."""
    command = [sys.executable, "-X", "utf8", "-m", "server.doctor.child", look]
    try:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
                              errors="replace", timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"no answer within {seconds:.0f} s") from None
    except OSError as error:
        raise ChildFailed(f"{sys.executable}: {error}") from None
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_KEPT_LINES:])
    raise ChildFailed(exit_reason(done.returncode), said)


def exit_reason(code: int) -> str:
    """What an exit code means, in words: ``SIGSEGV``, ``0xC0000005 access violation``, ``exit code 3``."""
    if code < 0 and -code in iter(signal.Signals):
        return signal.Signals(-code).name
    unsigned = code & 0xFFFFFFFF
    if unsigned >= 0x80000000:
        return f"0x{unsigned:08X} {_WINDOWS.get(unsigned, '')}".strip()
    return f"exit code {code}"

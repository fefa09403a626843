"""Runs checks beside each other: one that raises or hangs becomes a result, and the others go on."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from server.doctor.result import Check, Result, State
from server.errors import ServerError
from server.profiles import Note


class Outcome(NamedTuple):
    """A check with its result and the seconds that it took."""

    check: Check
    result: Result
    seconds: float


Box = queue.SimpleQueue[tuple[Result, float]]


def run_all(checks: Sequence[Check]) -> Iterator[Outcome]:
    """The outcomes in the checks' order, each as soon as it is there; all checks run at the same time.

    The threads are daemons: one that hangs in a system call does not keep the program from ending.
    """
    started = time.monotonic()
    boxes: list[Box] = []
    for check in checks:
        boxes.append(queue.SimpleQueue())
        threading.Thread(target=_run, args=(check, boxes[-1]), name=check.id, daemon=True).start()
    for check, box in zip(checks, boxes, strict=True):
        result, seconds = _wait(box, started + check.seconds) or (_cut_off(check), time.monotonic() - started)
        yield Outcome(check, result, round(seconds, 3))


def _wait(box: Box, deadline: float) -> tuple[Result, float] | None:
    """None when the time is over; looks up often, since Ctrl+C does not end a wait on Windows, nor always elsewhere."""
    while True:
        left = deadline - time.monotonic()
        with contextlib.suppress(queue.Empty):
            return box.get(timeout=min(0.2, max(0.0, left)))
        if left <= 0:
            return None


def _run(check: Check, box: Box) -> None:
    started = time.monotonic()
    try:
        result = check.run()
    except ServerError as error:  # has sentences for its reader
        result = Result(State.PROBLEM, Note(error.zh, error.en))
    except OSError as error:
        result = _unreadable(error) if error.filename else _crashed(error)
    except BaseException as error:
        result = _crashed(error)
    box.put((result, time.monotonic() - started))


def _unreadable(error: OSError) -> Result:
    why = error.strerror or type(error).__name__
    return Result(
        State.PROBLEM,
        Note(f"读不了 {error.filename}（{why}）", f"{error.filename} cannot be read ({why})"),
        Note("检查它在不在、当前用户能不能读；程序自己的文件不见了就重新解压",
             "see whether it is there and yours to read; unpack the program again if it is one of its own files"),
        {"traceback": "".join(traceback.format_exception(error))},
    )  # fmt: skip


def _crashed(error: BaseException) -> Result:
    words = f"{type(error).__name__}: {error}".strip(": ")
    return Result(
        State.PROBLEM,
        Note(f"这项检查自己出错了（{words}）", f"the check itself failed ({words})"),
        Note("其他检查不受影响；请用 --zip 打包结果，报告这个问题",
             "the other checks are not affected; pack the results with --zip and report this"),
        {"traceback": "".join(traceback.format_exception(error))},
    )  # fmt: skip


def _cut_off(check: Check) -> Result:
    seconds = f"{check.seconds:.0f}"
    return Result(
        State.PROBLEM,
        Note(f"{seconds} 秒没有结果，不再等了", f"no result within {seconds} seconds, given up"),
        Note("可能是磁盘、驱动或网络卡住了：重启电脑再试一次",
             "a disk, a driver or the network may be stuck: restart the computer and try again"),
        {"timeout": check.seconds},
    )  # fmt: skip

"""What a check is, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from server.profiles import Note

SECONDS = 15.0  # that a check may take, unless it says otherwise


class State(str, Enum):
    """In the order of how bad it is; the values are the report's."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"

    @property
    def rank(self) -> int:
        return list(State).index(self)


class Complaint(NamedTuple):
    """One thing that is wrong, and what to do about it, unless ``finding`` says that too."""

    state: State
    finding: Note
    advice: Note | None


@dataclass(frozen=True)
class Result:
    """What a check found. ``advice`` is what to do, or what is good to know; ``facts`` hold values that JSON has."""

    state: State
    finding: Note
    advice: Note | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Check(NamedTuple):
    """``run`` looks and judges; it may raise and it may hang: ``running`` makes a result of either."""

    id: str
    title: Note
    run: Callable[[], Result]
    seconds: float = SECONDS


def warning(zh: str, en: str, *, do: tuple[str, str] | None) -> Complaint:
    return Complaint(State.WARNING, Note(zh, en), Note(*do) if do else None)


def problem(zh: str, en: str, *, do: tuple[str, str] | None) -> Complaint:
    return Complaint(State.PROBLEM, Note(zh, en), Note(*do) if do else None)


def conclude(
    said: Note | None, complaints: Iterable[Complaint] = (), *, hint: Note | None = None, facts: Mapping[str, Any] = {}
) -> Result:
    """What was found, then what is wrong with it, the worst first; ``hint`` is given where nothing is wrong."""
    ordered = sorted(complaints, key=lambda complaint: -complaint.state.rank)
    findings = [said] * (said is not None) + [complaint.finding for complaint in ordered]
    advice = [complaint.advice for complaint in ordered if complaint.advice]
    if hint and not ordered:
        advice = [hint]
    state = ordered[0].state if ordered else State.OK
    return Result(state, joined(findings), joined(list(dict.fromkeys(advice))) if advice else None, facts)


def joined(notes: Iterable[Note]) -> Note:
    notes = list(notes)
    return Note("；".join(note.zh for note in notes), "; ".join(note.en for note in notes))


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

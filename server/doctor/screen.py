"""The page for a person: both languages, the user's own first."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime

from server.config import VERSION
from server.doctor.result import State
from server.doctor.running import Outcome
from server.profiles import Note

STATES = {
    State.OK: Note("正常", "ok"),
    State.WARNING: Note("注意", "warning"),
    State.PROBLEM: Note("问题", "problem"),
}
_INDENT = "     "
_NARROWEST = 60  # columns


class Page:
    """Lines for outcomes as they come; ``width`` in columns, a Chinese character has two."""

    def __init__(self, language: str, width: int):
        self._own, self._other = ("zh", "en") if language == "zh" else ("en", "zh")
        self._width = max(_NARROWEST, width)

    def head(self) -> str:
        when = datetime.now().isoformat(" ", "minutes")
        return f"chatglm-portable {VERSION} {self._both(Note('诊断', 'doctor'))}  {when}\n"

    def lines(self, outcome: Outcome) -> Iterator[str]:
        """One line where both languages fit into it, else one for each; then what to do."""
        check, result, _ = outcome
        state = f"[{getattr(STATES[result.state], self._own)}]"
        yield from self._pair(state + " ", check.title, result.finding)
        if result.advice:
            yield from self._advice(result.advice)

    def summary(self, outcomes: Sequence[Outcome]) -> str:
        counted = {state: [o.check.title for o in outcomes if o.result.state is state] for state in STATES}
        problems, warnings = counted[State.PROBLEM], counted[State.WARNING]
        zh = f"{len(problems)} 个问题，{len(warnings)} 个注意，{len(counted[State.OK])} 项正常"
        en = f"problems: {len(problems)}, warnings: {len(warnings)}, ok: {len(counted[State.OK])}"
        if problems:
            zh += f"。先解决：{'、'.join(title.zh for title in problems)}"
            en += f". To be solved first: {', '.join(title.en for title in problems)}"
        return "\n" + self._stacked(Note(zh, en))

    def _pair(self, lead: str, title: Note, text: Note) -> Iterator[str]:
        own, other = getattr(text, self._own), getattr(text, self._other)
        titled = self._both(title)
        if own == other:
            yield f"{lead}{titled}: {own}"
            return
        if _columns(both := f"{lead}{titled}: {own} · {other}") <= self._width:
            yield both
            return
        yield f"{lead}{getattr(title, self._own)}: {own}"
        yield f"{_INDENT}· {getattr(title, self._other)}: {other}"

    def _advice(self, advice: Note) -> Iterator[str]:
        texts = list(dict.fromkeys((getattr(advice, self._own), getattr(advice, self._other))))
        if _columns(both := f"{_INDENT}-> {' · '.join(texts)}") <= self._width:
            yield both
        else:
            yield from (f"{_INDENT}-> {text}" for text in texts)

    def _both(self, note: Note) -> str:
        own, other = getattr(note, self._own), getattr(note, self._other)
        return own if own == other else f"{own} {other}"

    def _stacked(self, note: Note) -> str:
        return f"{getattr(note, self._own)}\n{getattr(note, self._other)}"


def page_for(language: str) -> Page:
    """For the terminal that the program runs in; wide where the output goes elsewhere."""
    return Page(language, shutil.get_terminal_size((120, 50)).columns)


def _columns(text: str) -> int:
    """Characters of ambiguous width, such as the dot, are wide in a Chinese console."""
    return sum(2 if unicodedata.east_asian_width(character) in "WFA" else 1 for character in text)

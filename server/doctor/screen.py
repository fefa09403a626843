"""The page for a person: what is in order in a line each, then what is wrong and what to do, worst first."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime

from server.config import VERSION
from server.doctor.result import Result, State
from server.doctor.running import Outcome
from server.profiles import Note

STATES = {
    State.OK: Note("正常", "ok"),
    State.WARNING: Note("注意", "warning"),
    State.PROBLEM: Note("问题", "problem"),
}
TITLE = 15  # columns of the widest title in both languages
_NARROWEST = 60
_INDENT = "     "


class Page:
    """``languages``: "zh", "en" or both, the user's own first; ``width`` in columns, a Chinese character has two.

    ``brief``, for a console of a few lines: what is in order is cut to the width, and in one language where two do not
    fit into the line. What is wrong is always said in full.
    """

    def __init__(self, languages: Sequence[str], width: int, *, brief: bool = False):
        self._languages, self._width, self._brief = languages, max(_NARROWEST, width), brief

    def head(self) -> str:
        when = datetime.now().isoformat(" ", "minutes")
        return f"chatglm-portable {VERSION} {self._title(Note('诊断', 'doctor'))}  {when}\n"

    def fine(self, outcome: Outcome) -> Iterator[str]:
        """The line of a check that found nothing wrong, with what is good to know; no line of any other check."""
        check, result, _ = outcome
        if result.state is not State.OK:
            return
        title = self._title(check.title)
        lead = f"{self._state(State.OK)} {title}{' ' * max(0, TITLE - _columns(title))}  "
        lines = self._said(result.finding, lead, " " * _columns(lead))
        yield from (_cut(line, self._width) for line in lines[:1]) if self._brief else lines
        if result.advice:
            lines = self._said(result.advice, f"{_INDENT}-> ", f"{_INDENT}   ")
            yield from lines[:1] if self._brief else lines

    def summary(self, outcomes: Sequence[Outcome]) -> Iterator[str]:
        """What is wrong and what to do about it, problems first, then the numbers."""
        wrong = {state: [o for o in outcomes if o.result.state is state] for state in (State.PROBLEM, State.WARNING)}
        if any(wrong.values()):
            yield ""
        for titles, result in _grouped([*wrong[State.PROBLEM], *wrong[State.WARNING]]):
            lead = f"{self._state(result.state)} {', '.join(map(self._title, titles))}: "
            yield from self._said(result.finding, lead, _INDENT)
            if result.advice:
                yield from self._said(result.advice, f"{_INDENT}-> ", f"{_INDENT}-> ")
        problems, warnings = map(len, wrong.values())
        fine = len(outcomes) - problems - warnings
        zh = f"{problems} 个问题，{warnings} 个注意，{fine} 项正常。"
        en = f"problems: {problems}, warnings: {warnings}, ok: {fine}."
        if problems:
            titles = [outcome.check.title for outcome in wrong[State.PROBLEM]]
            zh += f"先解决：{'、'.join(title.zh for title in titles)}"
            en += f" To be solved first: {', '.join(title.en for title in titles)}"
        yield ""
        lines = self._said(Note(zh, en), "", "")
        yield from lines[:1] if self._brief else lines

    def _said(self, note: Note, lead: str, indent: str) -> list[str]:
        """One line where all languages fit into it, else one for each."""
        texts = self._texts(note)
        if _columns(line := lead + " · ".join(texts)) <= self._width:
            return [line]
        return [lead + texts[0], *(indent + text for text in texts[1:])]

    def _texts(self, note: Note) -> list[str]:
        return list(dict.fromkeys(getattr(note, language) for language in self._languages))

    def _title(self, title: Note) -> str:
        return " ".join(self._texts(title))

    def _state(self, state: State) -> str:
        return f"[{getattr(STATES[state], self._languages[0])}]"


def _grouped(outcomes: Sequence[Outcome]) -> list[tuple[list[Note], Result]]:
    """The titles of those that say the same: one file that cannot be read is said once."""
    groups: dict[tuple[State, Note, Note | None], tuple[list[Note], Result]] = {}
    for check, result, _ in outcomes:
        groups.setdefault((result.state, result.finding, result.advice), ([], result))[0].append(check.title)
    return list(groups.values())


def page_for(language: str) -> Page:
    """For where the output goes: brief on a terminal, in full elsewhere; without Chinese where that cannot be written.
    """
    stream = sys.stdout
    languages = ["zh", "en"] if language == "zh" else ["en", "zh"]
    if not _can_write("诊断", getattr(stream, "encoding", None)):
        languages.remove("zh")
    is_terminal = stream is not None and stream.isatty()
    # a line as long as the window is wide makes old Windows consoles go on to the next one
    return Page(languages, shutil.get_terminal_size((121, 50)).columns - 1, brief=is_terminal)


def _can_write(text: str, encoding: str | None) -> bool:
    try:
        return bool(text.encode(encoding or "utf-8"))
    except (UnicodeEncodeError, LookupError):
        return False


def _cut(text: str, width: int) -> str:
    if _columns(text) <= width:
        return text
    while _columns(text) > width - 3:
        text = text[:-1]
    return text + "..."


def _columns(text: str) -> int:
    """Characters of ambiguous width, such as the dot, are wide in a Chinese console."""
    return sum(2 if unicodedata.east_asian_width(character) in "WFA" else 1 for character in text)

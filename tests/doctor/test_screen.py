"""The page: one screen, the user's language first, what to do last, where the eye is."""

import io
import sys
import unicodedata

import pytest

from server.config import Config
from server.doctor import screen
from server.doctor.checks import all_checks
from server.doctor.machine import Machine
from server.doctor.result import Check, Result, State
from server.doctor.running import Outcome
from server.doctor.screen import TITLE, Page, page_for
from server.profiles import Note

ZH, EN = ("zh", "en"), ("en", "zh")


def outcome(state, finding, advice=None, title=("磁盘", "disk")):
    return Outcome(Check("disk", Note(*title), lambda: None), Result(state, finding, advice, {}), 0.5)


FINE = outcome(State.OK, Note("空闲", "free"))
BAD = outcome(State.PROBLEM, Note("满了" * 40, "full " * 20), Note("清理" * 40, "free some " * 20), ("内存", "memory"))
ODD = outcome(State.WARNING, Note("D:\\x", "D:\\x"), Note("短", "short"), ("文件夹", "folder"))


def columns(line):
    """As Windows' consoles of Chinese systems count, the widest there are."""
    return sum(2 if unicodedata.east_asian_width(character) in "WFA" else 1 for character in line)


def test_the_users_language_comes_first():
    zh, en = list(Page(ZH, 80).summary([BAD])), list(Page(EN, 80).summary([BAD]))
    assert [line.strip()[:9] for line in zh[1:5]] == ["[问题] 内存 m", "full full", "-> 清理清理清理", "-> free s"]
    assert [line.strip()[:9] for line in en[1:5]] == ["[problem]", "满了满了满了满了满", "-> free s", "-> 清理清理清理"]


def test_what_fits_into_a_line_is_one_line():
    assert list(Page(ZH, 80).fine(FINE)) == ["[正常] 磁盘 disk        空闲 · free"]
    assert list(Page(EN, 80).fine(FINE)) == ["[ok] disk 磁盘        free · 空闲"]
    assert list(Page(EN, 80).summary([ODD]))[1:3] == ["[warning] folder 文件夹: D:\\x", "     -> short · 短"]


def test_what_is_wrong_comes_last_and_problems_before_warnings():
    lines = list(Page(EN, 80).summary([ODD, FINE, BAD]))
    assert not list(Page(EN, 80).fine(ODD)) and not list(Page(EN, 80).fine(BAD))
    starts = [index for index, line in enumerate(lines) if line.startswith("[")]
    assert [lines[index].split()[0] for index in starts] == ["[problem]", "[warning]"]
    assert lines[-2].startswith("problems: 1, warnings: 1, ok: 1. To be solved first: memory")
    assert "先解决：内存" in lines[-1]
    assert "first" not in "".join(Page(EN, 80).summary([FINE, ODD]))


def test_what_several_checks_say_is_said_once():
    same = outcome(State.PROBLEM, BAD.result.finding, BAD.result.advice, ("档位", "profile"))
    lines = list(Page(EN, 80).summary([BAD, ODD, same]))
    assert [line.split(": ")[0] for line in lines if line.startswith("[")] == [
        "[problem] memory 内存, profile 档位", "[warning] folder 文件夹"]  # fmt: skip
    assert "problems: 2" in lines[-2] and "first: memory, profile" in lines[-2]


@pytest.mark.parametrize("width", range(60, 130, 7))
def test_a_brief_line_is_never_wider_than_the_window(width):
    wide = outcome(State.OK, Note("字" * 60, "a" * 150))
    for languages in (ZH, EN):
        (line,) = Page(languages, width, brief=True).fine(wide)
        assert width - 2 <= columns(line) <= width and line.endswith("...")
    assert len(list(Page(ZH, width).fine(wide))) == 2, "in full where there is room"
    assert "字" * 60 in "".join(Page(ZH, width).fine(wide))


def test_findings_stand_below_each_other():
    starts = set()
    for title in (("内存", "memory"), ("依赖包", "packages"), ("Python", "Python")):
        for languages in (ZH, EN):
            (line,) = Page(languages, 80).fine(outcome(State.OK, Note("$", "$"), title=title))
            starts.add((languages, columns(line[: line.index("$")])))
    assert len(starts) == 2


def test_every_title_has_room(tmp_path):
    titles = [check.title for check in all_checks(Machine(Config(model="demo"), root=tmp_path), None)]
    assert max(columns(" ".join(dict.fromkeys(title))) for title in titles) == TITLE


@pytest.mark.parametrize(
    ("encoding", "language", "shown"),
    [("utf-8", "zh", ZH), ("gbk", "en", EN), ("cp1252", "zh", EN[:1]), ("ascii", "en", EN[:1]), ("none", "zh", EN[:1])],
)
def test_no_question_marks_where_chinese_cannot_be_written(monkeypatch, encoding, language, shown):
    class Stream(io.StringIO):
        pass

    stream = Stream()
    Stream.encoding = encoding
    monkeypatch.setattr(sys, "stdout", stream)
    lines = "".join([page_for(language).head(), *page_for(language).fine(FINE)])
    assert lines.count("空闲") == lines.count("诊断") == ("zh" in shown)
    assert lines.index("free") >= 0 and page_for(language)._languages == list(shown)


def test_a_terminal_gets_the_brief_page(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"
        isatty = staticmethod(lambda: True)

    monkeypatch.setenv("COLUMNS", "80")
    wide = outcome(State.OK, Note("字" * 60, "a" * 150))
    assert len(list(page_for("zh").fine(wide))) == 2
    monkeypatch.setattr(screen.sys, "stdout", Terminal())
    (line,) = page_for("zh").fine(wide)
    assert columns(line) < 80

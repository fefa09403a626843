"""The page, the JSON and the zip; nobody's name, key or chat is in the zip."""

import json
import zipfile
from pathlib import Path, PureWindowsPath

import pytest

from server.config import Config
from server.doctor import report
from server.doctor.report import Mask, as_json, write_zip
from server.doctor.result import Check, Result, State
from server.doctor.running import Outcome
from server.doctor.screen import Page
from server.errors import StartupError
from server.profiles import Note


def outcome(state, finding, advice=None, name="disk", facts=None):
    return Outcome(Check(name, Note("磁盘", "disk"), lambda: None), Result(state, finding, advice, facts or {}), 0.5)


FINE = outcome(State.OK, Note("空闲", "free"))
BAD = outcome(State.PROBLEM, Note("满了" * 40, "full " * 20), Note("清理" * 40, "free some " * 20), "memory",
              {"free": 0})  # fmt: skip
ODD = outcome(State.WARNING, Note("D:\\x", "D:\\x"), Note("短", "short"), "folder")


def test_the_users_language_comes_first():
    zh, en = list(Page("zh", 80).lines(BAD)), list(Page("en", 80).lines(BAD))
    assert [line.strip()[:9] for line in zh] == ["[问题] 磁盘: ", "· disk: f", "-> 清理清理清理", "-> free s"]
    assert [line.strip()[:9] for line in en] == ["[problem]", "· 磁盘: 满了满", "-> free s", "-> 清理清理清理"]


def test_what_fits_into_a_line_is_one_line():
    assert list(Page("zh", 80).lines(FINE)) == ["[正常] 磁盘 disk: 空闲 · free"]
    assert list(Page("en", 80).lines(FINE)) == ["[ok] disk 磁盘: free · 空闲"]
    assert list(Page("en", 80).lines(ODD)) == ["[warning] disk 磁盘: D:\\x", "     -> short · 短"]


def test_chinese_characters_are_two_columns_wide():
    wide = outcome(State.OK, Note("字" * 20, "a" * 19))
    for width in range(60, 100):
        assert all(len(line.encode("gbk")) <= width for line in Page("zh", width).lines(wide))
    assert len(list(Page("zh", 90).lines(wide))) == 1 < len(list(Page("zh", 60).lines(wide)))


def test_summary_names_what_to_solve():
    text = Page("en", 80).summary([FINE, BAD, ODD])
    assert "problems: 1, warnings: 1, ok: 1. To be solved first: disk" in text
    assert text.index("problems") < text.index("1 个问题")
    assert "first" not in Page("en", 80).summary([FINE])


def test_json():
    document = as_json([FINE, BAD, ODD], Config(language="zh"))
    assert document["state"] == "problem" and document["counts"] == {"ok": 1, "warning": 1, "problem": 1}
    assert document["checks"][1] == {
        "id": "memory", "title": {"zh": "磁盘", "en": "disk"}, "state": "problem",
        "finding": BAD.result.finding._asdict(), "advice": BAD.result.advice._asdict(), "facts": {"free": 0},
        "seconds": 0.5,
    }  # fmt: skip
    assert document["checks"][0]["advice"] is None
    json.dumps(document)


# what a zip must not have


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (r"C:\Users\张三\chatglm", r"<home>\chatglm"),
        (r'"path": "C:\\Users\\张三\\chatglm"', r'"path": "<home>\\chatglm"'),
        (r"c:\users\张三\x", r"<home>\x"),
        ("D:/备份/张三/x", "D:/备份/<user>/x"),
        ("用户张三的文件", "用户<user>的文件"),
        (r"C:\Users\张三丰", r"C:\Users\<user>丰"),
        ("from DESKTOP-AB12 here", "from <computer> here"),
        ("http://me:pw@proxy:1/", "http://***@proxy:1/"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("sk-abcdefgh12345678", "***"),
        ("x hf_AbCdEfGhIjKl y", "x *** y"),
        ("api_key = 'abc'", "api_key = ***"),
        ("the value s3cr3t-value it is", "the value *** it is"),
        ("tokenizer.model", "tokenizer.model"),
        ("max_length = 4096", "max_length = 4096"),
        ("PyTorch 2.13.0+cpu", "PyTorch 2.13.0+cpu"),
    ],
)
def test_names_and_keys_are_taken_out(text, masked):
    env = {"USERNAME": "张三", "COMPUTERNAME": "DESKTOP-AB12", "MY_API_KEY": "s3cr3t-value", "KEY": "x"}
    assert Mask(env, home=PureWindowsPath(r"C:\Users\张三"))(text) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("/home/li/chatglm", "<home>/chatglm"),
        ("/home/lisa/x", "/home/lisa/x"),
        ("/data/li/x", "/data/<user>/x"),
        ("client library", "client library"),
        ("line li ne", "line li ne"),
    ],
)
def test_a_short_name_is_no_part_of_words(text, masked):
    assert Mask({"USER": "li"}, home=Path("/home/li"))(text) == masked


def test_a_longer_name_is_taken_out_as_a_word():
    mask = Mask({"USER": "maria"}, home=Path("/home/maria"))
    assert mask("/home/maria/x of Maria, mariadb") == "<home>/x of <user>, mariadb"


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A user of a telling name, with chats and keys in every place that the program knows."""
    home = tmp_path / "home" / "zhangsan"
    root = home / "chatglm"
    (root / ".venv").mkdir(parents=True)
    (root / ".venv" / "installed.json").write_text('{"requirements.txt": "abc"}')
    (root / "chatlog.log").write_text('{"query": "我的秘密问题", "answer": "zhangsan"}')
    (root / "chatlog.log.1").write_text("更早的秘密")
    (root / "config.toml").write_text("model = 'demo'\nprefix = '好'\n# api_key = 'sk-0123456789abcdef'\n", "utf-8")
    for name, value in {"USER": "zhangsan", "HOME": str(home), "USERPROFILE": str(home), "LOGNAME": "zhangsan",
                        "HF_TOKEN": "hf_geheimgeheim", "CHATGLM_MODEL": str(root / "m"),
                        "HTTP_PROXY": "http://u:passwort@proxy:1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return root


def test_zip_without_chats_names_and_keys(private):
    config = Config(model=str(private / "m"), chat_log=private / "chatlog.log", config=private / "config.toml")
    seen = outcome(State.OK, Note(str(private), str(private)), facts={"path": str(private), "key": "hf_geheimgeheim"})
    path = write_zip([seen, BAD], config, private)
    assert path.parent == private
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
        texts = {name: file.read(name).decode() for name in names}
    assert set(names) == {"doctor.json", "doctor.txt", "settings.txt", "packages.txt", "logs.txt", "config.toml",
                          ".venv-installed.json.txt"}  # fmt: skip
    everything = "".join(texts.values())
    for secret in ("zhangsan", "秘密", "geheim", "passwort", "sk-0123"):
        assert secret not in everything, secret
    assert "<home>" in texts["doctor.txt"] and "HTTP_PROXY=http://***@proxy:1" in texts["settings.txt"]
    assert json.loads(texts["doctor.json"])["checks"][1]["id"] == "memory"
    assert all(words in texts["logs.txt"] for words in ("no log file", "chatlog.log (", "left out"))
    assert "pytest " in texts["packages.txt"] and "model = 'demo'" in texts["config.toml"]


def test_zip_goes_where_it_can_be_written(private, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert write_zip([FINE], Config(), private / "not there").parent == elsewhere


def test_zip_that_cannot_be_written_anywhere(private, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Path, "cwd", lambda: tmp_path / "no")
    monkeypatch.setattr(report.Path, "home", lambda: tmp_path / "no")
    monkeypatch.setattr(report.tempfile, "gettempdir", lambda: str(tmp_path / "no"))
    with pytest.raises(StartupError) as caught:
        write_zip([FINE], Config(), tmp_path / "no")
    assert "could not be packed" in caught.value.en and "打包失败" in caught.value.zh

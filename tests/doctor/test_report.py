"""The JSON and the zip; nobody's name, key or chat is in the zip."""

import io
import json
import zipfile

import pytest

from server.config import Config
from server.doctor import report
from server.doctor.report import as_json, write_zip
from server.doctor.result import Check, Result, State
from server.doctor.running import Outcome
from server.errors import StartupError
from server.profiles import Note


def outcome(state, finding, advice=None, name="disk", facts=None):
    return Outcome(Check(name, Note("磁盘", "disk"), lambda: None), Result(state, finding, advice, facts or {}), 0.5)


FINE = outcome(State.OK, Note("空闲", "free"))
BAD = outcome(State.PROBLEM, Note("满了" * 40, "full " * 20), Note("清理" * 40, "free some " * 20), "memory",
              {"free": 0})  # fmt: skip
ODD = outcome(State.WARNING, Note("D:\\x", "D:\\x"), Note("短", "short"), "folder")


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
    assert all(words in texts["logs.txt"] for words in ("server.log", "chatlog.log (", "left out"))
    assert "pytest " in texts["packages.txt"] and "model = 'demo'" in texts["config.toml"]


def test_what_cannot_be_packed_costs_its_own_file(private, monkeypatch):
    """A damaged package, a secret file of root's, names that are no text: the zip is made all the same."""
    info = private / "site" / "broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    monkeypatch.syspath_prepend(str(private / "site"))
    monkeypatch.setattr(report, "_settings", lambda config: 1 / 0)
    odd = outcome(State.OK, Note("x", "x"), facts={"files": {"name\udcff": 1}})
    with zipfile.ZipFile(write_zip([odd], Config(), private)) as file:
        assert "ZeroDivisionError" in file.read("settings.txt").decode()
        packages = file.read("packages.txt").decode()
        assert "pytest " in packages and "zhangsan" not in packages
        assert list(json.loads(file.read("doctor.json"))["checks"][0]["facts"]["files"]) == ["name\udcff"]


def test_what_is_documented_stays_even_if_the_user_is_called_so(private, monkeypatch):
    monkeypatch.setenv("USER", "memory")
    monkeypatch.setenv("USERNAME", "facts")
    seen = outcome(State.OK, Note("of memory", "of memory"), name="memory", facts={"memory": {"/facts/x": "memory"}})
    with zipfile.ZipFile(write_zip([seen], Config(), private)) as file:
        check = json.loads(file.read("doctor.json"))["checks"][0]
    assert check["id"] == "memory" and check["facts"] == {"memory": {"/<user>/x": "<user>"}}
    assert check["finding"] == {"zh": "of <user>", "en": "of <user>"}


def test_only_the_beginning_of_a_large_file_is_packed(private, monkeypatch):
    (private / "config.toml").write_bytes(b"# \xff \xbd\xa1\n" * 400_000)
    with zipfile.ZipFile(write_zip([FINE], Config(config=private / "config.toml"), private)) as file:
        assert 2**15 < file.getinfo("config.toml").file_size < 2**18


def test_spooled_questions_and_chats_stay(private):
    (private / "spool" / "requests").mkdir(parents=True)
    for name in ("1.request", "1.history", "1.back"):
        (private / "spool" / "requests" / name).write_text("geheime Frage")
    config = Config(spool=private / "spool", prefix="geheimer Anfang", chat_log=private / "chatlog.log")
    with zipfile.ZipFile(write_zip([FINE], config, private)) as file:
        packed = b"".join(file.read(name) for name in file.namelist()).decode()
        assert not any("spool" in name or "chatlog" in name for name in file.namelist())
    assert "geheim" not in packed and "秘密" not in packed


def test_the_end_of_the_logs_is_packed_without_names(private):
    """Whatever their encoding and however large they are."""
    (private / "server.old.log").write_bytes("zhangsan 旧".encode("gbk"))
    (private / "server.log").write_bytes(b"first\n" + b"\xff x\n" * 500_000 + f"in {private}: last\n".encode())
    with zipfile.ZipFile(write_zip([FINE], Config(), private)) as file:
        log, old = (file.read(name).decode() for name in ("server.log", "server.old.log"))
    assert log.endswith("in <home>/chatglm: last\n") and "first" not in log and len(log) < 2**18
    assert old.startswith("<user> ")


def test_two_at_once_make_two(private):
    assert write_zip([FINE], Config(), private) != write_zip([FINE], Config(), private)
    assert len(list(private.glob("doctor-*.zip"))) == 2


def test_a_full_disk_leaves_no_half_a_zip(private, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:10])
            raise OSError(28, "No space left on device")

    real = report.Path.open

    def opened(path, mode="r", **options):
        return Full(path, "xb") if path.parent == private and mode == "xb" else real(path, mode, **options)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(report.Path, "open", opened)
    assert write_zip([FINE], Config(), private).parent == elsewhere
    assert not list(private.glob("doctor-*"))


def test_zip_goes_where_it_can_be_written(private, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert write_zip([FINE], Config(), private / "not there").parent == elsewhere


def test_zip_that_cannot_be_written_anywhere(private, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Path, "cwd", lambda: tmp_path / "no")
    monkeypatch.setattr(report.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(report.tempfile, "gettempdir", lambda: str(tmp_path / "no"))
    with pytest.raises(StartupError) as caught:
        write_zip([FINE], Config(), tmp_path / "no")
    assert "could not be packed" in caught.value.en and "打包失败" in caught.value.zh

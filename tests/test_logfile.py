"""server.log: starts and failures are in it, what users write is not, and no state of the disk matters."""

import contextlib
import logging
import os

import pytest

from server import logfile
from server.logfile import keep_log, starts
from tests.functional.live import request
from tests.functional.program import Program
from tests.test_main import copy, one_sentence, start  # noqa: F401


@pytest.fixture
def keep(tmp_path):
    """Keeps the log in a folder of its own; the handlers go afterwards."""
    made = []

    def start():
        made.append(keep_log(tmp_path))
        return made[-1]

    yield start
    for file in made:
        with contextlib.suppress(OSError):  # of the full disk
            file.close()
        for logger in (starts, logging.getLogger()):
            logger.removeHandler(file)


def test_what_may_quote_a_client_is_left_out(keep, tmp_path):
    file, kept = keep(), tmp_path / "server.log"
    for name in ("server.api.app", "server.spool.loop", "waitress", "server"):
        logging.getLogger(name).error("%s: secret", name)
    assert not kept.exists()
    logging.getLogger("server.models.loader").error("模型")
    starts.error("why")
    # past pytest's own handlers, which cannot write such a name
    file.handle(logging.makeLogRecord({"name": "server.quant", "msg": "\udcff"}))
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("ERROR server.models.loader: 模型")
    assert lines[1].endswith("ERROR server.start: why") and lines[2].endswith("server.quant: \\udcff")


def test_a_large_one_is_put_aside(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(logfile, "_LARGE", 10)
    (tmp_path / "server.old.log").write_text("oldest")
    (tmp_path / "server.log").write_text("older than that")
    keep()
    starts.error("new")
    assert (tmp_path / "server.old.log").read_text() == "older than that"
    assert (tmp_path / "server.log").read_text().count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="there is no /dev/full")
def test_where_it_cannot_be_written_nothing_is_said(keep, tmp_path, capsys):
    keep()
    tmp_path.rmdir()
    starts.error("lost")
    tmp_path.mkdir()
    (tmp_path / "server.log").symlink_to("/dev/full")
    starts.error("lost too")
    assert capsys.readouterr() == ("", "")


def test_starts_and_failures_but_no_questions(copy):  # noqa: F811
    assert "no-such-model" in one_sentence(start("--model", "no-such-model", root=copy))
    with Program(root=copy) as program:
        for body in ({"query": "绝密问题"}, {"query": "绝密" * 9000}, {"query": ["绝密"]}, b"{\xbe\xf8\xc3\xdc"):
            request(program.port, body=body)
    log = (copy / "server.log").read_text(encoding="utf-8")
    assert log.count("serve 0.") == 2 and "ERROR server.start: There is no model no-such-model" in log
    assert "绝密" not in log and "\\u7edd" not in log

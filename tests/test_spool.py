"""The spool beside a client that does all kinds of things."""

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from server.config import parse
from server.errors import ContextOverflow, GenerationFailed, StartupError
from server.spool.folder import MAX_BYTES, open_folder
from server.spool.names import check_name
from server.spool.writers import can_tell_writers, is_being_written
from tests.spooling import ANSWER, Desk, EchoEngine

POSIX = pytest.mark.skipif(os.name == "nt", reason="files that Windows does not have")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    desk = Desk(tmp_path / "spool", monkeypatch)
    desk.start()
    yield desk
    desk.stop()


def test_the_originals_quick_start(desk):
    """As its README has it, with what echo writes."""
    desk.ask("1", "我喜欢吃橘子，你呢？\n", history="\n")
    desk.wait()
    assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("我喜欢吃橘子，你呢？")


@pytest.mark.parametrize(
    "written",
    ["你好".encode(), b"\xef\xbb\xbf" + "你好".encode(), "你好".encode("gbk"), "你好\r\n".encode("utf-16"),
     b"\xfe\xff" + "你好".encode("utf-16-be")],
    ids=["utf-8", "bom", "gbk", "powershell", "big-endian"],
)  # fmt: skip
def test_encodings(desk, written):
    desk.ask("1", written)
    desk.wait()
    assert desk.read("1.back") == ANSWER("你好")


def test_spaces_in_front_are_the_questions_own(desk):
    desk.ask("1", "    return 1\n")
    desk.wait()
    assert desk.read("1.back") == ANSWER("    return 1")


@pytest.mark.parametrize(
    ("written", "rounds"),
    [
        ("", []), ("  \r\n", []), ("''  \r\n", []), ('""', []), ("[]", []), ('[["q", "a"]]', [("q", "a")]),
        ('\ufeff[["问","答"],["q","a"]]\n', [("问", "答"), ("q", "a")]),
        ('[["q1","a1","q2","a2"]]', [("q1", "a1"), ("q2", "a2")]),
    ],
)  # fmt: skip
def test_histories(desk, written, rounds):
    desk.ask("1", "x", history=written)
    desk.wait()
    assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("x", *rounds)


def test_as_many_at_once_as_there_is_room_for_in_order_of_arrival(desk):
    go = threading.Event()
    desk.start(EchoEngine(go, capacity=9), at_once=3)
    names = ["z", "y", "10", "9", "b", "a", "c"]
    for name in names:
        desk.ask(name, name)
        desk.wait(0.3)
    desk.wait()
    assert [request.messages[-1].content for request in desk.engine.requests] == names[:3]
    go.set()
    desk.wait()
    assert [request.messages[-1].content for request in desk.engine.requests] == names
    assert desk.files() == sorted(name + ".back" for name in names)


def test_requests_that_waited_for_the_program_come_by_their_time(desk):
    for name in ("b", "c", "a"):
        desk.ask(name, name)
    desk.start(at_once=1)
    desk.wait(3)
    assert [request.messages[-1].content for request in desk.engine.requests] == ["b", "c", "a"]


def test_no_error_but_patience_while_others_have_all_places(desk):
    desk.engine.capacity = 0
    desk.ask("1", "x")
    desk.wait(5)
    assert desk.files() == ["1.request"]
    desk.engine.capacity = 1
    desk.wait(0.5)
    assert desk.read("1.back") == ANSWER("x")


def test_engine_is_asked_as_the_original_asked_its_model(desk):
    desk.ask("1", "x")
    desk.wait()
    (request,) = desk.engine.requests
    assert (request.params.temperature, request.params.top_p, request.params.top_k) == (0.95, 0.7, 50)
    assert request.overflow == "drop_oldest" and request.params.max_length is None


def test_chat_log_has_the_exchange(desk):
    desk.ask("1", "x", history='[["q","a"]]')
    desk.wait()
    (entry,) = desk.records
    assert (entry["client"], entry["query"], entry["answer"]) == ("spool", "x", ANSWER("x", ("q", "a")))
    assert entry["final"].finish_reason == "stop" and entry["request_id"]


class TestWholeFilesOnly:
    def test_a_request_that_still_changes_waits(self, desk):
        for length in range(1, 20):
            desk.write("1.request", "x" * length)
            desk.wait(0.4)
            assert desk.engine.requests == []
        desk.wait(1)
        assert desk.read("1.back") == ANSWER("x" * 19)

    def test_a_change_of_the_same_length_counts(self, desk):
        desk.ask("1", "old")
        desk.wait(0.5)
        desk.ask("1", "new")
        desk.wait()
        assert desk.read("1.back") == ANSWER("new")

    def test_an_empty_request_gets_time_to_be_written(self, desk):
        desk.ask("1", "")
        desk.wait(8)
        assert desk.files() == ["1.request"]
        desk.ask("1", "x")
        desk.wait()
        assert desk.files() == ["1.back"]

    def test_history_may_follow_the_request_closely(self, desk):
        desk.ask("1", "x")
        desk.wait(0.3)
        desk.write("1.history", '[["q","a"]]')
        desk.wait()
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("x", ("q", "a"))

    @pytest.mark.parametrize("file", ["1.request", "1.history"])
    def test_a_writer_that_pauses(self, desk, file):
        if not can_tell_writers(__file__) or sys.platform not in ("linux", "win32"):
            pytest.skip("this system does not tell who has a file open")
        with open(desk.requests / file, "w") as slow:
            slow.write("[]" if file.endswith(".history") else "first, ")
            slow.flush()
            if file == "1.history":
                desk.ask("1", "x")
            desk.wait(30)
            assert desk.engine.requests == []
            slow.write(" " if file.endswith(".history") else "then")
            desk.wait(20)
            assert desk.engine.requests == []
        desk.wait()
        assert desk.read("1.back") == ANSWER("x" if file == "1.history" else "first, then")

    def test_a_reader_is_no_writer(self, desk):
        desk.ask("1", "x")
        with open(desk.requests / "1.request"):
            assert not is_being_written(str(desk.requests / "1.request"))

    @POSIX
    def test_a_writer_that_never_closes_its_file(self, desk):
        with open(desk.requests / "1.request", "w") as forgotten:
            forgotten.write("x")
            forgotten.flush()
            desk.wait(70)
            assert desk.read("1.back") == ANSWER("x")

    @pytest.mark.parametrize(
        "file",
        [".1.request", "~$1.request", ".#1.request", "1.request.part", "1.request~", "#1.request#", "1.requests",
         ".request", "..request", "...request"],
    )  # fmt: skip
    def test_temporary_files_are_not_looked_at(self, desk, file):
        desk.write(file, "x")
        desk.wait(15)
        assert desk.files() == [file] and desk.engine.requests == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_file", "history", "said"),
        [
            ("x", "[[1]]", "history[0][0] must be a string"),
            ("x", '[["q","a"],["q"]]', "history[1]: questions and answers are expected in pairs"),
            ("x", '{"q": "a"}', "history must be an array"),
            ("x", "[[", "history: The JSON is malformed at line 1"),
            ("x", b"\xff\x00\xff", "The history file is not text"),
            (b"\x89PNG\r\n\x1a\n\x00\x00", None, "The request file is not text"),
            (b"PK\x03\x04\x00\x00", None, "The request file is not text"),
            ("", None, "The request file is empty"),
            (" \n", None, "The request file is empty"),
            (b"x" * (MAX_BYTES + 1), None, "1.request is too large: at most 8 MiB"),
            ("x", b" " * (MAX_BYTES + 1), "1.history is too large"),
        ],
    )  # fmt: skip
    def test_bad_input(self, desk, request_file, history, said):
        desk.ask("1", request_file, history)
        desk.ask("2", "good")
        desk.wait(12)
        assert said in desk.read("1.error") and desk.read("1.error").count("\n") == 1
        assert desk.files() == ["1.error"] + ["1.history"] * (history is not None) + ["1.request", "2.back"]

    def test_in_the_users_language(self, desk):
        desk.start(language="zh")
        desk.ask("1", "x", "[[")
        desk.wait()
        assert "JSON 有误" in desk.read("1.error")

    def test_a_query_that_is_too_long(self, desk):
        desk.engine.refuse = ContextOverflow("太长", "too long: 9 tokens, 5 are allowed")
        desk.ask("1", "x")
        desk.wait()
        assert desk.files() == ["1.error", "1.request"] and "9 tokens" in desk.read("1.error")

    def test_a_generation_that_fails_can_be_tried_again(self, desk):
        desk.start(EchoEngine(GenerationFailed("坏了", "it broke")))
        desk.ask("1", "x", "[]")
        desk.wait(5)
        assert desk.files() == ["1.error", "1.history", "1.request"] and desk.read("1.error") == "it broke\n"
        assert len(desk.engine.requests) == 1
        desk.engine.steps = ()
        (desk.requests / "1.error").unlink()
        desk.wait()
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("x")

    def test_an_engine_that_breaks_altogether(self, desk):
        desk.engine.refuse = RuntimeError("a defect")
        desk.ask("1", "x")
        desk.wait()
        assert desk.files() == ["1.error", "1.request"] and "a defect" not in desk.read("1.error")

    def test_a_corrected_request_is_answered_and_the_error_goes(self, desk):
        desk.ask("1", "x", "[[")
        desk.wait()
        desk.write("1.history", "[]")
        desk.wait()
        assert desk.files() == ["1.back"]

    def test_a_restart_tries_again(self, desk):
        """Whatever the files' times: corrected by a copy that keeps its time, or by removing the history alone."""
        for name in ("same", "copied", "alone"):
            desk.ask(name, "x", "[[")
        desk.wait()
        desk.stop()
        desk.write("copied.history", "[]")
        (desk.requests / "alone.history").unlink()
        desk.start()
        desk.wait()
        assert desk.files() == ["alone.back", "copied.back", "same.error", "same.history", "same.request"]

    def test_a_new_request_is_tried_whatever_its_time(self, desk):
        """Beside an error that is later than the file."""
        desk.ask("1", "x", "[[")
        desk.wait()
        for file in ("1.request", "1.history"):
            (desk.requests / file).unlink()
        desk.wait()
        desk.ask("1", "x")
        desk.wait()
        assert desk.files() == ["1.back"]

    @POSIX
    @pytest.mark.parametrize("file", ["1.request", "1.history"])
    @pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
    def test_what_is_no_file_is_not_opened(self, desk, file, kind, tmp_path):
        (tmp_path / "secret").write_text("[]")
        path = desk.requests / file
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / ("secret" if kind == "link" else "nowhere"))
        if file == "1.history":
            desk.ask("1", "x")
        desk.ask("2", "x")
        desk.wait(12)
        assert f"{file} is not an ordinary file" in desk.read("1.error")
        assert os.path.lexists(path) and desk.read("2.back")

    @POSIX
    @pytest.mark.parametrize(
        "name", ["CON", "nul.x", "Com1", "lpt¹", "aux ", "a\nb", "a\x7f", "up\\..\\x", "a\u2028b", "\udcff"], ids=ascii
    )
    def test_names_that_mean_something_else(self, desk, name):
        desk.ask(name, "x")
        desk.ask("2", "x")
        desk.wait()
        assert " name " in desk.read(name + ".error") and desk.read("2.back")
        desk.raise_flag("status")
        desk.wait(0.1)
        assert json.loads((desk.flags / "status.back").read_bytes())["Status"] == "idle"

    @pytest.mark.parametrize("name", ["1", "你好 🙂", "console", "com10", "a.b", "q.back", "q.request", "-", "x" * 247])
    def test_all_other_names(self, desk, name):
        check_name(name)
        desk.ask(name, "x", history="[]")
        desk.wait()
        assert desk.files() == [name + ".back"]


class TestChangesOfMind:
    """While the answer is being made."""

    @pytest.fixture
    def go(self, desk):
        go = threading.Event()
        desk.start(EchoEngine(go))
        desk.ask("1", "first", history="[]")
        desk.wait()
        assert len(desk.engine.requests) == 1
        return go

    def test_a_request_that_is_removed(self, desk, go):
        (desk.requests / "1.request").unlink()
        desk.wait()
        assert desk.engine.streams[0].closed.is_set()
        go.set()
        desk.wait()
        assert desk.files() == ["1.history"]

    @pytest.mark.parametrize(("file", "content"), [("1.request", "second"), ("1.history", '[["q","a"]]')])
    def test_inputs_that_are_replaced(self, desk, go, file, content):
        desk.write(file, content)
        go.set()  # the answer may be ready before the change is seen
        desk.wait()
        expected = ANSWER("second") if file == "1.request" else ANSWER("first", ("q", "a"))
        assert desk.files() == ["1.back"] and desk.read("1.back") == expected and desk.working() == ["lock"]

    def test_another_file_of_the_same_time_and_size(self, desk, go):
        """As where the file system's clock is coarse."""
        path, other = desk.requests / "1.request", desk.requests / "other.tmp"
        other.write_text("other")
        os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
        other.replace(path)
        go.set()  # the answer may be ready before the change is seen
        desk.wait()
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("other")

    def test_a_request_that_is_removed_before_it_is_taken(self, desk):
        # looks at the folder seem costly, so they are rare
        desk.clock.thread_time = desk.clock.perf_counter = itertools.count().__next__
        desk.ask("1", "x")
        desk.wait(0.4)
        (desk.requests / "1.request").unlink()
        desk.wait(20)
        assert desk.files() == [] and desk.engine.requests == []

    def test_a_history_that_is_removed(self, desk, go):
        (desk.requests / "1.history").unlink()
        desk.wait()
        go.set()
        desk.wait()
        assert desk.files() == ["1.back"] and len(desk.engine.requests) == 2

    def test_an_answer_that_somebody_interrupts_is_made_again(self, desk, go):
        desk.engine.streams[0].close()
        desk.wait(0.3)
        assert desk.files() == ["1.history", "1.request"]
        go.set()
        desk.wait()
        assert desk.files() == ["1.back"]

    def test_an_answer_that_the_engines_end_cuts_short_is_for_the_next_start(self, desk, go):
        desk.engine.close()
        desk.wait(0.3)
        assert desk.files() == ["1.history", "1.request"]

    def test_a_name_that_is_used_again(self, desk, go):
        go.set()
        desk.wait()
        desk.ask("1", "second")  # the first answer is still there
        desk.wait()
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("second")


class TestWhatIsInTheWay:
    def test_a_folder_where_the_answer_goes(self, desk, caplog):
        (desk.requests / "1.back").mkdir()
        desk.ask("1", "x")
        desk.ask("2", "x")
        desk.wait(20)
        assert desk.files() == ["1.back", "2.back"] and len(desk.engine.requests) == 2
        assert sum("'1'" in line for line in caplog.messages) == 1
        desk.start()  # it is not forgotten
        (desk.requests / "1.back").rmdir()
        desk.wait()
        assert desk.read("1.back") == ANSWER("x") and desk.working() == ["lock"]

    def test_a_folder_where_the_error_goes(self, desk):
        desk.ask("1", "x", "[[")
        desk.ask("2", "x")
        desk.wait(0.2)
        (desk.requests / "1.error").mkdir()
        desk.wait()
        assert desk.files() == ["1.error", "1.history", "1.request", "2.back"]
        (desk.requests / "1.error").rmdir()
        desk.wait()
        assert "history" in desk.read("1.error")

    def test_a_history_that_somebody_has_open_when_it_is_to_be_moved(self, desk, monkeypatch):
        """As on Windows. What is written into it then is asked anew, with the request that was moved already."""
        rename = os.rename

        def refuse(source, target):
            if source == str(desk.requests / "1.history"):
                raise PermissionError(13, "The process cannot access the file")
            rename(source, target)

        desk.ask("1", "x", "[]")
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            desk.wait()
            assert desk.files() == ["1.history"]
            desk.write("1.history", '[["q","a"]]')
        desk.wait()
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("x", ("q", "a"))

    @POSIX
    def test_a_name_for_which_the_path_is_too_long(self, tmp_path, monkeypatch):
        """It can be asked, but not be kept beside its answer."""
        longest = os.pathconf("/", "PC_PATH_MAX") - 1
        root, name = tmp_path, "x" * 200
        while (rest := longest - len(f"{root}/requests/{name}.request")) > 3:
            root /= "d" * min(200, rest - 1)
        desk = Desk(root, monkeypatch)
        desk.start()
        desk.ask(name, "x")
        desk.ask("2", "x")
        desk.wait()
        assert desk.files() == ["2.back", f"{name}.error", f"{name}.request"] and desk.working() == ["lock"]
        assert "choose a shorter name" in desk.read(f"{name}.error")
        desk.stop()

    @POSIX
    def test_links_where_output_goes_are_replaced_and_not_followed(self, desk, tmp_path):
        desk.ask("2", "x", "[[")
        desk.wait()
        (desk.requests / "2.error").unlink()
        for path in (desk.requests / "1.back", desk.requests / "2.error", desk.flags / "status.back"):
            path.symlink_to(tmp_path / "target")
        desk.ask("1", "x")
        desk.ask("2", "x", "[[ ")
        desk.raise_flag("status")
        desk.wait()
        assert not (tmp_path / "target").exists()
        assert desk.read("1.back") and desk.read("2.error") and (desk.flags / "status.back").read_bytes()

    @POSIX
    def test_a_disk_that_is_full_for_a_while(self, desk, monkeypatch, caplog):
        def full(descriptor):
            raise OSError(28, "No space left on device")

        desk.ask("1", "x")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            desk.wait(5)
            assert desk.files() == ["1.request"] and desk.working() == ["lock"]
            assert sum("No space" in line for line in caplog.messages) == 1
        desk.wait(0.3)
        assert desk.files() == ["1.back"] and len(desk.engine.requests) == 1

    def test_a_folder_that_is_away_for_a_while(self, desk, tmp_path):
        desk.ask("1", "x")
        desk.root.rename(tmp_path / "away")
        desk.wait()
        (tmp_path / "away").rename(desk.root)
        desk.wait()
        assert desk.files() == ["1.back"]

    @POSIX
    @pytest.mark.parametrize("removed", [".", "requests", "requests/.working"])
    @pytest.mark.parametrize("moment", ["idle", "answering", "storing"])
    def test_a_folder_that_is_removed_and_made_again(self, desk, removed, moment):
        go = threading.Event()
        desk.start(EchoEngine(*[go] * (moment == "answering")))
        if moment == "storing":
            (desk.requests / "1.back").mkdir()
        if moment != "idle":
            desk.ask("1", "first")
            desk.wait()
            assert len(desk.engine.requests) == 1
        shutil.rmtree(desk.root / removed)
        if removed == ".":
            desk.wait()
            assert not desk.root.exists()
        desk.requests.mkdir(parents=True, exist_ok=True)
        desk.write("1.request", "second")
        go.set()
        with contextlib.suppress(OSError):
            (desk.requests / "1.back").rmdir()
        desk.wait(3)
        assert desk.files() == ["1.back"] and desk.read("1.back") == ANSWER("second")
        assert desk.working() == ["lock"] and list(desk.flags.iterdir()) == []
        with pytest.raises(StartupError), open_folder(desk.root):
            pass

    @POSIX
    def test_a_folder_that_another_program_takes_when_it_is_made_again(self, desk):
        shutil.rmtree(desk.requests)
        with open_folder(desk.root), pytest.raises(StartupError, match="Another program"):
            desk.wait()


class TestFlags:
    def status(self, desk):
        desk.raise_flag("status")
        desk.wait(0.1)
        assert [path.name for path in desk.flags.iterdir()] == ["status.back"]
        return json.loads((desk.flags / "status.back").read_bytes())

    def test_status_tells_the_truth(self, desk):
        go = threading.Event()
        desk.start(EchoEngine(go), at_once=2)
        idle = {"Status": "idle", "Running": [], "Queue": 0, "Waiting": [], "Refused": []}
        assert self.status(desk) == idle
        for name in ("一", "b", "c", "d"):
            desk.ask(name, "x")
        desk.ask("bad", "x", "[[")
        desk.wait()
        waiting = ["c", "d", "bad"]
        running = {"Status": "running", "Running": ["一", "b"], "Queue": 3, "Waiting": waiting, "Refused": []}
        assert self.status(desk) == running
        go.set()
        desk.wait()
        assert self.status(desk) == {**idle, "Refused": ["bad"]}

    def test_status_knows_what_came_just_now(self, desk):
        desk.ask("1", "x")
        assert self.status(desk)["Waiting"] == ["1"]

    def test_quit_waits_for_the_answers_in_hand_and_begins_no_other(self, desk):
        go = threading.Event()
        desk.start(EchoEngine(go), at_once=2)
        for name in "abc":
            desk.ask(name, "x")
        desk.wait()
        desk.raise_flag("quit")
        assert desk.wait() and list(desk.flags.iterdir()) == []
        go.set()
        assert not desk.wait()
        assert desk.files() == ["a.back", "b.back", "c.request"]

    def test_quit_while_idle(self, desk):
        desk.raise_flag("quit")
        assert not desk.wait(0.2) and list(desk.flags.iterdir()) == []

    def test_an_old_quit_flag_does_not_end_a_new_program(self, desk):
        desk.raise_flag("quit")
        desk.start()
        assert desk.wait() and list(desk.flags.iterdir()) == []

    def test_a_status_that_cannot_be_written_does_not_keep_the_program_from_quitting(self, desk):
        (desk.flags / "status.back").mkdir()
        desk.raise_flag("status")
        desk.wait()
        desk.raise_flag("quit")
        assert not desk.wait()

    def test_a_status_that_cannot_be_written_costs_no_more_than_a_scan(self, desk):
        (desk.flags / "status.back").mkdir()
        desk.raise_flag("status")
        looks = count_looks(desk, 0.02)
        desk.wait(20)
        assert len(looks) <= 8
        (desk.flags / "status.back").rmdir()
        desk.wait(10)
        assert [path.name for path in desk.flags.iterdir()] == ["status.back"]

    def test_folders_are_no_flags(self, desk):
        (desk.flags / "quit.flag").mkdir()
        (desk.flags / "status.flag").mkdir()
        assert desk.wait()

    def test_run_says_that_it_is_ready_and_stops_when_told(self, desk, capsys):
        go, told = threading.Event(), threading.Event()
        desk.start(EchoEngine(go, told))
        desk.ask("1", "x")
        thread = threading.Thread(target=desk.spool.run, args=(told,))
        thread.start()
        desk.clock.now += 1
        while not desk.engine.requests:
            desk.clock.now += 0.1
        told.set()
        thread.join(10)
        assert not thread.is_alive() and desk.engine.streams[0].closed.is_set()
        assert desk.files() == ["1.request"]
        loaded, running = capsys.readouterr().out.splitlines()
        assert loaded.startswith("[Info ") and loaded.endswith("]: Loaded.") and running.endswith("]: Running...")


class TestFolder:
    @pytest.mark.parametrize("argv", [["spool", "--dir", "d"], ["spool", "--spool=d"], ["--spool", "d"]])
    def test_options(self, argv, tmp_path):
        assert parse(argv, env={}, root=tmp_path).spool == Path.cwd() / "d"

    def test_no_folder_unless_asked_for(self, tmp_path):
        assert parse([], env={}, root=tmp_path).spool is None

    def test_one_program_at_a_time(self, desk):
        desk.raise_flag("quit")
        with pytest.raises(StartupError) as caught, open_folder(desk.root):
            pass
        assert str(desk.root) in caught.value.zh and "Another program" in caught.value.en
        assert (desk.flags / "quit.flag").exists()  # it was not for the second one to take
        desk.stop()
        with open_folder(desk.root):
            pass

    @pytest.mark.parametrize("blocked", ["spool", "spool/requests", "spool/flags", "spool/requests/.working"])
    def test_a_folder_that_cannot_be_used(self, tmp_path, blocked):
        path = tmp_path / blocked
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a file")
        with pytest.raises(StartupError) as caught, open_folder(tmp_path / "spool"):
            pass
        assert str(tmp_path / "spool") in caught.value.zh

    @pytest.mark.parametrize("blocked", [False, True])
    def test_what_is_left_is_read_before_the_program_starts(self, desk, blocked, monkeypatch):
        """A failure there is one sentence, and the folder is free again."""
        desk.stop()
        if blocked:
            scandir = os.scandir

            def refuse(path):
                if str(path).endswith(".working"):
                    raise PermissionError(13, "Permission denied")
                return scandir(path)

            monkeypatch.setattr(os, "scandir", refuse)
        for _ in range(2):
            if blocked:
                with pytest.raises(StartupError, match="Permission denied"), open_folder(desk.root):
                    pass
            else:
                with open_folder(desk.root) as folder:
                    assert folder.left == {}

    def test_a_large_folder_is_looked_at_less_often(self, desk):
        looks = count_looks(desk, 0.02)
        desk.wait(20)
        assert 4 <= len(looks) <= 6

    def test_a_clock_of_work_with_long_steps(self, desk):
        """As on Windows, where a look of no time may seem to have taken 16 ms."""
        looks = count_looks(desk, 0.0)
        desk.clock.thread_time = itertools.count(step=0.016).__next__
        desk.wait(20)
        assert len(looks) > 60


def count_looks(desk, cost):
    """The times of looks at the folder, each of which takes ``cost`` seconds of a core."""
    looks = []
    scan = desk.spool._folder.scan

    def slow_scan():
        looks.append(desk.clock.now)
        desk.clock.busy += cost
        return scan()

    desk.spool._folder.scan = slow_scan
    return looks

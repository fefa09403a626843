"""The spool as a program: killed at random moments, stopped, and beside the HTTP server."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.functional.program import Program
from tests.functional.spool_driver import echo

DRIVER = Path(__file__).with_name("spool_driver.py")


class Spooling:
    """A program on a spool folder, its output in a file; killed at the end if it still runs."""

    def __init__(self, folder: Path, *command: str, **env: str):
        self.output = folder.with_name(folder.name + ".log")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM_")}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env={**clean, "CHATGLM_LANG": "en", **env},
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.005)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: "]: Running..." in self.text)


def real(folder: Path, *options: str) -> Spooling:
    return Spooling(folder, "-m", "server", "spool", "--dir", str(folder), "--model", "demo", "--no-chat-log", *options)


class Client:
    """Has one question open under each of its names; writes files in all the ways that clients do."""

    def __init__(self, folder: Path, names: list[str], seed: int):
        self.requests = folder / "requests"
        self.requests.mkdir(parents=True, exist_ok=True)
        self.answered = 0
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self.open: dict[str, str] = {}
        for name in names:
            self.ask(name)

    def ask(self, name: str) -> None:
        query = f"question {next(self._numbers)} of {name}"
        history = [["q", f"a {query}"]] if self._random.random() < 0.5 else []
        self.open[name] = echo(query, *history)
        if history:
            self._write(f"{name}.history", json.dumps(history))
        self._write(f"{name}.request", query)

    def _write(self, file: str, text: str) -> None:
        path = self.requests / file
        if self._random.random() < 0.5:
            path.write_text(text)
        else:
            path.with_suffix(".tmp").write_text(text)
            path.with_suffix(".tmp").replace(path)

    def collect(self, *, ask_again: bool = True) -> int:
        """Check and take away every answer that is there."""
        found = [path for path in self.requests.glob("*.back") if path.stem in self.open]
        for path in found:
            assert path.read_text() == self.open.pop(path.stem)
            assert not (self.requests / f"{path.stem}.request").exists()
            assert not (self.requests / f"{path.stem}.history").exists()
            path.unlink()
            self.answered += 1
            if ask_again:
                self.ask(path.stem)
        return len(found)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.requests.iterdir() if path.name != ".working")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_sixty_kills_lose_nothing_and_answer_nothing_twice(tmp_path):
    folder = tmp_path / "spool"
    client = Client(folder, [f"n{number}" for number in range(12)], seed=1)
    moments = random.Random(2)
    for _ in range(60):
        with Spooling(folder, str(DRIVER), str(folder)) as program:
            before = client.answered
            program.wait_for(lambda before=before: client.collect() and client.answered > before + 3)
            until = time.perf_counter() + moments.uniform(0, 0.03)
            while time.perf_counter() < until:
                client.collect()
            program.process.send_signal(signal.SIGKILL)
            program.process.wait()
    assert client.answered > 60 * 3
    with Spooling(folder, str(DRIVER), str(folder)) as program:
        program.wait_for(lambda: client.collect(ask_again=False) < 0 or not client.open)
        (folder / "flags" / "quit.flag").touch()
        assert program.process.wait(20) == 0
    # one more program would find what was left to be answered twice
    with Spooling(folder, str(DRIVER), str(folder)) as program:
        program.wait_until_ready()
        time.sleep(0.2)
        (folder / "flags" / "quit.flag").touch()
        assert program.process.wait(20) == 0
    assert client.files() == [] and os.listdir(folder / "requests" / ".working") == ["lock"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_the_real_program_killed_three_times(tmp_path):
    folder = tmp_path / "spool"
    requests = folder / "requests"
    requests.mkdir(parents=True)
    names = [f"q{number}" for number in range(16)]
    for number, name in enumerate(names):
        if number % 2:
            (requests / f"{name}.history").write_text('[["你好", "你好！"]]', encoding="utf-8")
        (requests / f"{name}.request").write_text("你是谁？", encoding="utf-8")
    moments = random.Random(3)
    answers: dict[str, bytes] = {}

    def collect() -> int:
        for path in requests.glob("*.back"):
            assert path.stem not in answers
            answers[path.stem] = path.read_bytes()
            path.unlink()
        return len(answers)

    for goal in (2, 6, 10):
        with real(folder, "--slots", "2") as program:
            program.wait_for(lambda goal=goal: collect() >= goal)
            time.sleep(moments.uniform(0, 0.05))
            program.process.send_signal(signal.SIGKILL)
    with real(folder, "--slots", "2") as program:
        program.wait_for(lambda: collect() == len(names))
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(20) == 0
    assert sorted(answers) == sorted(names) and all(answer.decode() for answer in answers.values())
    assert os.listdir(requests) == [".working"] and os.listdir(requests / ".working") == ["lock"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The command by itself, with little room."""
    folder = tmp_path_factory.mktemp("real") / "池"
    with real(folder, "--max-length", "256") as program:
        program.wait_until_ready()
        program.folder, program.requests = folder, folder / "requests"
        yield program


def test_it_says_that_it_is_ready_as_the_original_did(program):
    lines = [line for line in program.text.splitlines() if line.startswith("[Info ")]
    assert [line.partition("]: ")[2] for line in lines] == ["Loaded.", "Running..."]


def test_oldest_rounds_are_dropped(program):
    (program.requests / "long.history").write_text(json.dumps([["问题" * 30, "回答" * 30]] * 40), encoding="utf-8")
    (program.requests / "long.request").write_text("你好", encoding="utf-8")
    program.wait_for((program.requests / "long.back").exists)
    assert (program.requests / "long.back").read_text(encoding="utf-8")


def test_a_query_that_is_too_long_is_told_both_numbers(program):
    (program.requests / "huge.request").write_text("很长" * 2000, encoding="utf-8")
    program.wait_for((program.requests / "huge.error").exists)
    sentence = (program.requests / "huge.error").read_text(encoding="utf-8")
    assert "tokens" in sentence and "204" in sentence and (program.requests / "huge.request").exists()


def test_status(program):
    (program.folder / "flags" / "status.flag").touch()
    program.wait_for(lambda: not (program.folder / "flags" / "status.flag").exists())
    assert json.loads((program.folder / "flags" / "status.back").read_text(encoding="utf-8"))["Status"] == "idle"


def test_a_second_program_on_the_folder_says_so(program):
    with real(program.folder) as second:
        assert second.process.wait(60) == 2
        assert len(second.text.splitlines()) == 1 and "Another program" in second.text


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with real(tmp_path / "file") as program:
        assert program.process.wait(60) == 2
        assert len(program.text.splitlines()) == 1 and str(tmp_path / "file") in program.text


def test_quit_flag_ends_the_program(program):
    (program.folder / "flags" / "quit.flag").touch()
    assert program.process.wait(20) == 0 and not (program.folder / "flags" / "quit.flag").exists()
    assert "Traceback" not in program.text


@pytest.mark.parametrize("how", [signal.SIGINT, "quit.flag"])
def test_beside_the_http_server(tmp_path, how):
    folder = tmp_path / "spool"
    with Program("--spool", str(folder), "--slots", "1", "--queue", "1") as program:
        program.wait_for(r"\]: Running\.\.\.")
        back = folder / "requests" / "last.back"
        for name in (*"abcdefgh", "last"):
            (folder / "requests" / f"{name}.request").write_text("你好", encoding="utf-8")
        assert program.ask("你好")  # a long queue of files leaves HTTP clients a place
        deadline = time.monotonic() + 60
        while not back.exists():
            assert time.monotonic() < deadline, program.text
            time.sleep(0.02)
        assert program.ask("你好")
        if how == "quit.flag":
            (folder / "flags" / how).touch()
        assert program.stop(how=0 if how == "quit.flag" else how) == 0
        assert "Traceback" not in program.text and len(list((folder / "requests").glob("*.back"))) == 9

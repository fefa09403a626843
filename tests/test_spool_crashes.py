"""The program dies before, between and behind all of its file operations; the client goes on as clients do."""

import contextlib
import itertools
import os

import pytest

from server.spool import folder
from tests.spooling import ANSWER, Desk

FIRST, SECOND = "first", "second question"
ROUNDS = {None: (), '[["q","a"]]': (("q", "a"),), '[["other","one"]]': (("other", "one"),)}
OLD, NEW = '[["q","a"]]', '[["other","one"]]'


class Killed(BaseException):
    """Nothing catches this, as nothing catches kill -9."""


class Machine:
    """Stands for ``os`` in the folder's module: ends the program before its ``last``-th change of a file."""

    def __init__(self, desk: Desk, monkeypatch):
        self.last: int | None = None
        self.changes = 0
        self.before = lambda operation, arguments: None
        monkeypatch.setattr(folder, "os", self)
        monkeypatch.setattr(folder.SpoolFolder, "_write", self._write)
        self._desk = desk

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            return real

        def changing(*arguments):
            self._count()
            self.before(name, arguments)
            return real(*arguments)

        return changing

    def _write(self, file, data):
        path = self._desk.requests / ".working" / file
        for written in (b"", data[: len(data) // 2], data):
            self._count()
            path.write_bytes(written)

    def _count(self):
        if self.changes == self.last:
            raise Killed
        self.changes += 1

    def run(self, last: int | None = None) -> bool:
        """Start the program and let it do all there is to do; False if it died before its ``last``-th change."""
        self.last = None
        self._desk.start()  # which touches no request
        self.last, self.changes = last, 0
        try:
            self._desk.wait(2.0)
        except Killed:
            return False
        return True


class Client:
    """Asks under one name; ``answers`` are what it got, ``expected`` what it should have got by the end."""

    def __init__(self, desk: Desk, query: str, history: str | None):
        self.desk = desk
        self.answers: list[str] = []
        self.expected: list[str] = []
        self.ask(query, history)

    def ask(self, query: str, history: str | None) -> None:
        self.expect(query, history)
        self.remove("history", "request")
        self.desk.ask("1", query, history)

    def expect(self, query: str, history: str | None) -> None:
        self.history, self.asked = history, ANSWER(query, *ROUNDS[history])
        self.expected.append(self.asked)

    def collect(self) -> bool:
        answer = self.desk.collect("1")
        if answer is not None:
            assert answer == self.asked and self.desk.files() == []
            self.answers.append(answer)
        return answer is not None

    def give_up(self) -> None:
        """On a request that nobody answers."""
        self.expected.pop()

    def remove(self, *suffixes: str) -> None:
        for suffix in suffixes:
            (self.desk.requests / f"1.{suffix}").unlink(missing_ok=True)


def waits(client):
    pass


def collects(client):
    client.collect()


def asks_again(query, history):
    """What it asked before or something else, if the answer has come; else it has lost its patience and asks anew."""

    def act(client):
        if not client.collect():
            client.give_up()
        client.ask(query, history)

    return act


def changes_the_history(client):
    if not client.collect() and (client.desk.requests / "1.request").exists():
        client.give_up()
        client.expect(FIRST, NEW)
        client.desk.write("1.history", NEW)


def rewrites_the_request_alone(client):
    if not client.collect() and (client.desk.requests / "1.request").exists():
        client.give_up()
        client.expect(SECOND, client.history)
        client.desk.write("1.request", SECOND)


def asks_anew(history):
    def act(client):
        client.give_up()
        client.ask(SECOND, history)

    return act


def withdraws(client):
    if not client.collect() and (client.desk.requests / "1.request").exists():
        client.give_up()
        client.remove("request", "history")


ACTIONS = {
    "waits": waits,
    "collects": collects,
    "asks the same": asks_again(FIRST, OLD),
    "asks the same without a history": asks_again(FIRST, None),
    "asks another": asks_again(SECOND, None),
    "asks another with a history": asks_again(SECOND, NEW),
    "changes the history": changes_the_history,
    "rewrites the request alone": rewrites_the_request_alone,
    "withdraws": withdraws,
}


@pytest.fixture
def desks(tmp_path_factory, monkeypatch):
    """Makes empty desks, one after the other."""
    numbers = itertools.count()
    base = tmp_path_factory.mktemp("crashes")
    with contextlib.ExitStack() as stack:

        def make():
            stack.close()
            desk = Desk(base / str(next(numbers)), monkeypatch)
            desk.requests.mkdir(parents=True)
            stack.callback(desk.stop)
            return desk, Machine(desk, monkeypatch)

        yield make


@pytest.mark.parametrize("history", [None, OLD], ids=["alone", "with history"])
@pytest.mark.parametrize("action", ACTIONS)
def test_no_request_is_lost_and_none_answered_twice(desks, history, action):
    """Killed at every point, and the next program killed at every point too, with the client acting in between."""
    points = 0
    for first in itertools.count():
        for second in itertools.count():
            desk, machine = desks()
            client = Client(desk, FIRST, history)
            survived = machine.run(first)
            ACTIONS[action](client)
            survived_again = machine.run(second)
            client.collect()
            if not survived_again:
                assert machine.run()
                client.collect()
            assert client.answers == client.expected, (first, second)
            assert desk.working() == ["lock"] and desk.files() in ([], ["1.history"] * (action == "withdraws"))
            points += 1
            if survived_again:
                break
        if survived:
            break
    assert points > 20


@pytest.mark.parametrize(
    ("moment", "history", "act"),
    [
        (".request", None, asks_anew(None)), (".request", None, asks_anew(NEW)),
        (".request", OLD, asks_anew(None)), (".request", OLD, asks_anew(NEW)),
        (".request", None, changes_the_history), (".request", OLD, changes_the_history),
        (".request", None, rewrites_the_request_alone), (".request", OLD, rewrites_the_request_alone),
        (".history", OLD, asks_anew(None)), (".history", OLD, asks_anew(NEW)),
    ],
)  # fmt: skip
def test_a_request_that_is_replaced_while_it_is_moved(desks, moment, history, act):
    """Between the program's last look at its stamps and the step that moves the file; killed at every point."""
    for last in itertools.count():
        desk, machine = desks()
        client = Client(desk, FIRST, history)

        def replace(operation, arguments, desk=desk, client=client, machine=machine):
            if operation == "rename" and str(arguments[0]) == str(desk.requests / ("1" + moment)):
                machine.before = lambda *_: None
                act(client)

        machine.before = replace
        survived = machine.run(last)
        client.collect()
        machine.run()
        client.collect()
        assert client.expected != [ANSWER(FIRST, *ROUNDS[history])] and client.answers == client.expected, last
        assert desk.working() == ["lock"] and desk.files() == []
        if survived:
            break
    assert last > 8

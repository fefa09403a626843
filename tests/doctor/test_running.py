"""Checks that raise, hang or end their process are results, and the others go on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.doctor import children
from server.doctor.children import ChildFailed, ask, exit_reason
from server.doctor.machine import Machine, Once
from server.doctor.result import Check, Complaint, Result, State, conclude, problem, warning
from server.doctor.running import run_all
from server.errors import ModelError
from server.profiles import Note
from tests.conftest import ROOT

FINE = Result(State.OK, Note("好", "fine"))
posix = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX'")


def check(name, run, seconds=5.0):
    return Check(name, Note(name, name), run, seconds)


def raises(error):
    def run():
        raise error

    return run


def test_outcomes_come_in_order_whatever_happens_to_one():
    stuck = threading.Event()
    checks = [
        check("crash", raises(ZeroDivisionError("1/0"))),
        check("hang", stuck.wait, 0.3),
        check("exit", raises(SystemExit(3))),
        check("sentence", raises(ModelError("缺文件。", "A file is missing."))),
        check("fine", lambda: FINE),
    ]
    started = time.monotonic()
    outcomes = list(run_all(checks))
    assert time.monotonic() - started < 3
    stuck.set()
    assert [outcome.check.id for outcome in outcomes] == ["crash", "hang", "exit", "sentence", "fine"]
    crash, hang, exited, sentence, fine = (outcome.result for outcome in outcomes)
    assert crash.state is State.PROBLEM and "ZeroDivisionError: 1/0" in crash.finding.zh
    assert "test_running.py" in crash.facts["traceback"]
    assert hang.state is State.PROBLEM and "no result within 0 seconds" in hang.finding.en
    assert exited.state is State.PROBLEM and "SystemExit" in exited.finding.en
    assert sentence.finding == Note("缺文件。", "A file is missing.")
    assert fine is FINE


def test_a_file_that_cannot_be_read_is_named():
    (outcome,) = run_all([check("x", Path("/no/such/文件").read_bytes)])
    assert outcome.result.state is State.PROBLEM and "report" not in outcome.result.advice.en
    assert outcome.result.finding == Note("读不了 /no/such/文件（No such file or directory）",
                                          "/no/such/文件 cannot be read (No such file or directory)")  # fmt: skip


def test_checks_run_beside_each_other():
    meeting = threading.Barrier(3, timeout=5)
    outcomes = list(run_all([check(str(n), lambda: (meeting.wait() and FINE) or FINE) for n in range(3)]))
    assert [outcome.result for outcome in outcomes] == [FINE] * 3


def test_conclusion_begins_with_the_worst():
    hint = Note("提示", "hint")
    said = conclude(Note("甲", "a"), [warning("乙", "b", do=("做乙", "do b")), problem("丙", "c", do=("做丙", "do c"))],
                    hint=hint, facts={"x": 1})  # fmt: skip
    assert said == Result(State.PROBLEM, Note("甲；丙；乙", "a; c; b"), Note("做丙；做乙", "do c; do b"), {"x": 1})
    assert conclude(Note("甲", "a"), hint=hint) == Result(State.OK, Note("甲", "a"), hint)
    alone = conclude(None, [Complaint(State.WARNING, Note("乙", "b"), None)])
    assert alone == Result(State.WARNING, Note("乙", "b"))


def test_once_looks_once_for_many_and_repeats_its_failure():
    looks = []

    def look():
        looks.append(1)
        time.sleep(0.05)
        raise ModelError("坏", "broken")

    once, failures = Once(look), []

    def ask_it():
        with pytest.raises(ModelError) as caught:
            once()
        failures.append(caught.value)

    threads = [threading.Thread(target=ask_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looks) == 1 and len(failures) == 4


@pytest.fixture
def fake_module(tmp_path, monkeypatch):
    """A package of a given name that children import instead of the real one."""

    def make(name, code):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return make


def test_what_raises_in_a_child_is_told(fake_module):
    fake_module("torch", "raise OSError(\"[WinError 126] Error loading 'D:\\\\模型\\\\c10.dll'\")")
    assert ask("torch", 20) == {"error": "OSError: [WinError 126] Error loading 'D:\\模型\\c10.dll'", "kind": "OSError"}


def test_what_a_module_prints_does_not_disturb(fake_module):
    fake_module("torch", "import sys; print('hello'); print('{', file=sys.stderr); raise ImportError('no')")
    assert ask("torch", 20)["error"] == "ImportError: no"


def test_what_happens_after_the_look_is_of_no_interest(fake_module):
    """Torn down, PyTorch may print, crash or hang."""
    code = "import atexit, os, threading, time; atexit.register(lambda: os._exit(3)); atexit.register(print, '{}'); "
    fake_module("torch", code + "threading.Thread(target=time.sleep, args=(99,)).start(); raise ImportError('so')")
    assert ask("torch", 20)["error"] == "ImportError: so"


@posix
def test_a_child_that_is_killed(fake_module):
    fake_module("torch", "import os, sys; print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ChildFailed) as caught:
        ask("torch", 20)
    assert str(caught.value) == "SIGKILL" and caught.value.output == "last words"


def test_a_child_that_hangs(fake_module):
    fake_module("torch", "import time; time.sleep(1000)")
    started = time.monotonic()
    with pytest.raises(ChildFailed, match="no answer within 1 s"):
        ask("torch", 1)
    assert time.monotonic() - started < 5


def test_a_child_finds_the_packages_that_its_parent_finds(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('from PYTHONPATH')")
    code = "from server.doctor.children import ask; print(ask('torch', 60))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for flags, leaks in (((), True), (("-E",), False)):
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert ("from PYTHONPATH" in done.stdout) == leaks, done


def test_a_python_that_is_not_there(monkeypatch):
    monkeypatch.setattr(children.sys, "executable", "/no/such/python")
    with pytest.raises(ChildFailed, match="/no/such/python"):
        ask("gpus", 5)


@pytest.mark.parametrize(
    ("code", "said"),
    [(3, "exit code 3"), (-1073741819, "0xC0000005 access violation"), (0xC0000135, "0xC0000135 a DLL was not found"),
     (0xC0000999, "0xC0000999")],
)  # fmt: skip
def test_exit_codes(code, said):
    assert exit_reason(code) == said


@posix
def test_exit_by_signal():
    assert exit_reason(-signal.SIGSEGV) == "SIGSEGV"


@posix
def test_a_driver_that_ends_the_process_costs_the_gpus_alone(fake_module, tmp_path):
    from server.config import Config

    fake_module("pynvml", "import os\ndef nvmlInit(): os.kill(os.getpid(), 11)\n")
    machine = Machine(Config(model="demo", device="auto"))
    found = machine.gpus()
    assert str(found.failure) == "SIGSEGV" and found.gpus == ()
    assert machine.hardware().ram_total > 0
    assert machine.profile()[0].device == "cpu"


def test_gpus_come_back_from_the_child_as_they_are(fake_module):
    from server.config import Config
    from server.hardware import GPU

    fake_module("pynvml", """
class NVMLError(Exception): pass
class M: total, free = 12 << 30, 11 << 30
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetMemoryInfo = lambda handle: M
nvmlDeviceGetName = lambda handle: "NVIDIA 测试 3060"
nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 6)
nvmlDeviceGetUUID = lambda handle: "GPU-1"
nvmlSystemGetDriverVersion = lambda: "560.35"
""")
    machine = Machine(Config(model="demo"), env={})
    assert machine.gpus() == ((GPU(0, "NVIDIA 测试 3060", 12 << 30, 11 << 30, (8, 6), "GPU-1"),), "560.35", None)
    assert machine.hardware().gpus == machine.gpus().gpus and machine.hardware().driver == "560.35"
    assert sys.modules.get("pynvml") is None or "测试" not in str(sys.modules["pynvml"])

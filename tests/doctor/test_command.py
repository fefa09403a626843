"""``python -m server doctor`` as a process: without any package, on a broken installation, for other programs."""

import contextlib
import json
import os
import re
import subprocess
import sys
import unicodedata
import zipfile

import psutil
import pytest

from server.config import Config
from server.doctor import command
from server.doctor.checks import all_checks
from server.doctor.machine import Machine
from server.doctor.result import State
from server.doctor.running import run_all
from tests.conftest import ROOT
from tests.doctor.process import IDS, call, posix, results
from tests.functional.program import Program

FAILED_TORCH = {"cuda_error", "error", "kind", "output"}  # facts of one that does not work


@pytest.fixture(scope="module")
def healthy():
    """The JSON of a whole installation, this one."""
    return call(sys.executable, "--model", "demo", "--port", "0", "--json")


def test_here_with_the_demo(healthy):
    done, found = healthy, results(healthy)
    assert list(found) == IDS
    assert found["torch"]["facts"]["version"].startswith("2.") and found["torch"]["state"] == "ok"
    assert found["model"]["facts"]["family"] == "chatglm2" and found["profile"]["facts"]["device"] == "cpu"
    assert found["needs"]["facts"]["needs"] > 2**28
    assert found["kernels"]["facts"]["state"] in ("compiled", "can be compiled", "none")
    problems = [check for check in found.values() if check["state"] == "problem"]
    assert done.returncode == bool(problems)


def test_nothing_but_the_standard_library_is_imported():
    code = "import sys, server.doctor, server.doctor.child; " \
           "print(*sorted({m.split('.')[0] for m in sys.modules if '_distutils' not in m} - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["__main__", "server", "system"]


@posix
def test_without_any_package(bare):
    done = call(bare, "--model", "demo", "--port", "0")
    assert done.returncode == 1 and done.stderr == "" and "Traceback" not in done.stdout
    assert "No module named 'torch'" in done.stdout and "start ./run.sh" in done.stdout
    assert "To be solved first: packages, PyTorch" in done.stdout
    states = re.findall(r"^\[(ok|warning|problem)\]", done.stdout, re.MULTILINE)
    assert len(states) == len(IDS) and states.count("problem") == 2
    found = results(call(bare, "--model", "demo", "--port", "0", "--json"))
    assert set(found["packages"]["facts"]["installed"].values()) == {None}
    assert found["memory"]["facts"]["total"] > 0 and found["profile"]["facts"]["name"] == "cpu"


@posix
def test_the_only_packages_it_looks_for_are_done_without(bare, packages):
    """A finder that comes before all others notes everything that is neither the standard library's nor ours."""
    (packages / "guard.pth").write_text("import guard\n")
    (packages / "guard.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        known = name.split('.')[0] in {*sys.stdlib_module_names, 'server', 'system', 'sitecustomize',"
        " 'usercustomize'}\n"
        "        if not known and len(sys.argv) > 1 and sys.argv[1] == 'doctor':\n"
        "            wanted.write(name + '\\n')\n"
        "wanted = open(os.environ['WANTED'], 'a', buffering=1)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    log = packages / "wanted.txt"
    done = call(bare, "--model", "demo", "--port", "0", "--json", WANTED=str(log))
    assert results(done)["profile"]["state"] == "ok"
    wanted = set(log.read_text().split()) - {"org"}  # which copy.py of the standard library looks for
    assert "psutil" in wanted and wanted <= {"psutil", "torch", "ziglang"}


def test_a_faulty_configuration_is_a_result(copy):
    (copy / "config.toml").write_text("port = 'many'\n")
    done = call(sys.executable, "--json", root=copy)
    found = results(done)
    assert done.returncode == 1 and "port in" in found["settings"]["finding"]["en"]
    assert found["port"]["facts"]["number"] == 5178
    config, wrong = command.read_options(["doctor"], env={"CHATGLM_PROT": "1", "CHATGLM_LANG": "zh"}, root=copy / "no")
    assert "CHATGLM_PROT" in wrong.zh and config.language == "zh"


def test_a_faulty_command_line_is_one_sentence():
    done = call(sys.executable, "--prot", "1")
    assert done.returncode == 2 and done.stdout == "" and "Did you mean --port?" in done.stderr
    done = call(sys.executable, "--help")
    assert done.returncode == 0 and "--zip" in done.stdout and "--json" in done.stdout


def test_settings_of_the_file_are_checked(copy):
    (copy / "config.toml").write_text("model = 'demo'\nport = 0\nhost = '0.0.0.0'\n")
    found = results(call(sys.executable, "--json", root=copy))
    assert found["settings"]["state"] == "ok" and str(copy) in found["settings"]["finding"]["en"]
    assert found["model"]["facts"]["folder"] == str(copy / "THUDM" / "demo")
    assert found["lan"]["facts"]["host"] == "0.0.0.0"


@posix
@pytest.mark.parametrize(("language", "first", "second"), [("zh", "内存", "memory"), ("en", "memory", "内存")])
def test_both_languages_the_users_first(bare, language, first, second):
    done = call(bare, "--model", "demo", "--port", "0", CHATGLM_LANG=language)
    assert done.stdout.index(first) < done.stdout.index(second)
    zh, en = done.stdout.index("项正常"), done.stdout.index("problems: ")
    assert (zh < en) == (language == "zh")


@posix
@pytest.mark.parametrize(("language", "rows", "columns"), [("zh", 25, 80), ("en", 30, 120)])
def test_a_healthy_machine_is_one_screen(language, rows, columns):
    """Of the smallest console there is, and of Windows' own: what is in order has a line each."""
    import fcntl
    import pty
    import struct
    import termios

    console, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"CHATGLM_LANG": language}
    process = subprocess.Popen([sys.executable, "-m", "server", "doctor", "--model", "demo", "--port", "0"], cwd=ROOT,
                               env=env, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL)  # fmt: skip
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # Linux' word for the end
        while piece := os.read(console, 65536):
            written += piece
    process.wait(60)
    os.close(console)
    lines = written.decode().splitlines()
    fine = [line for line in lines if line.startswith(("[正常]", "[ok]"))]
    used = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) for line in fine]
    assert max(used) < columns and len(fine) > 12
    wrong = [line for line in lines if line.startswith(("[注意]", "[warning]", "[问题]", "[problem]"))]
    assert len(fine) + len(wrong) <= len(IDS) and len(lines) <= rows - 2 + 3 * len(wrong), lines


def test_zip_has_everything_and_names_nobody(copy, tmp_path):
    (copy / "chatlog.log").write_text('{"query": "secret question"}')
    done = call(sys.executable, "--model", "demo", "--port", "0", "--zip", root=copy, USER="zhangsan")
    (packed,) = copy.glob("doctor-*.zip")
    assert str(packed) in done.stdout and "不含聊天内容" in done.stdout
    with zipfile.ZipFile(packed) as file:
        assert {"doctor.json", "doctor.txt", "settings.txt", "packages.txt", "logs.txt"} <= set(file.namelist())
        texts = b"".join(file.read(name) for name in file.namelist()).decode()
        assert [check["id"] for check in json.loads(file.read("doctor.json"))["checks"]] == IDS
    assert "secret question" not in texts and "zhangsan" not in texts


def test_our_running_server_is_found():
    """What the doctor says of the model is what the server does; what it holds itself is no problem."""
    with Program() as program:
        found = results(call(sys.executable, "--model", "demo", "--port", str(program.port), "--json"))
        huge = Config("chatglm2-6b", device="cpu", quantize=16, max_length=32768, slots=256, port=program.port)
        (lacking,) = run_all([check for check in all_checks(Machine(huge), None) if check.id == "needs"])
        resident = psutil.Process(program.process.pid).memory_info().rss
    assert "this program is running" in found["port"]["finding"]["en"]
    profile, needs = found["profile"]["facts"], found["needs"]["facts"]["needs"]
    assert f"profile: {profile['name']} (not quantized, {profile['dtype']}, on cpu" in program.text
    assert f"needs about {needs / 2**30:.1f} GiB" in program.text
    assert f"at once: {profile['slots']}, of at most {profile['max_length']} tokens each" in program.text
    assert 0.2 * needs < resident < needs
    assert lacking.result.state is State.WARNING and "stop it, then run the doctor" in lacking.result.advice.en


def test_documented_keys_are_those_of_the_report(healthy):
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    document = json.loads(healthy.stdout)
    for key in (*document, *document["counts"], *document["checks"][0]):
        assert f"`{key}`" in text, key
    assert re.findall(r"^\| `(\w+)` \|", text.split("## Checks")[1], re.MULTILINE) == IDS
    for check in document["checks"]:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{check['id']}` |")]
        named = set(re.findall(r"`([\w.]+)`", row.split("|")[3]))
        there = set(check["facts"]) | (FAILED_TORCH if check["id"] == "torch" else set())
        assert there == named or check["id"] == "vcruntime", (check["id"], there ^ named)


@pytest.mark.parametrize(("name", "size"), [("chatglm2-6b", 12_487_000_000), ("chatglm2-6b-int4", 3_923_712_365)])
def test_size_of_a_download_is_told_before_it(tmp_path, name, size):
    """Within one in a thousand of the published files; it is of the disk too."""
    checks = all_checks(Machine(Config(model=name), root=tmp_path), None)
    found = {outcome.check.id: outcome.result for outcome in run_all([c for c in checks if c.id in ("model", "disk")])}
    assert f"about {size / 1e9:.1f} GB" in found["model"].advice.en
    assert found["disk"].facts["model"] == pytest.approx(size, rel=0.001)


def test_every_check_has_an_id_of_its_own(tmp_path):
    checks = all_checks(Machine(Config(model="demo"), root=tmp_path), None)
    assert [check.id for check in checks] == IDS

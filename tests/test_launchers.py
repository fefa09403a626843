"""The .bat files as text (what cmd.exe trips over), and under wine where it is installed; run.sh for real."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAUNCHERS = {
    "开启API服务.bat": "",
    "start_small_vram.bat": "--profile small ",
    "start_medium_vram.bat": "--profile medium ",
    "start_large_vram.bat": "--profile large ",
}
BATS = sorted([*ROOT.glob("*.bat"), *(ROOT / "system").glob("*.bat")])
posix = pytest.mark.skipif(os.name == "nt", reason="a shell script")


def test_all_launchers_are_there():
    assert {path.name for path in ROOT.glob("*.bat")} == {*LAUNCHERS, "setup_offline.bat", "诊断.bat"}


BUILT_IN = {"cd", "del", "echo", "exit", "for", "goto", "if", "mkdir", "move", "pause", "set", "setlocal", "type"}
CONDITION = re.compile(r"if (/i )?(not )?((exist|defined) \S+|\S+==\S+|\S+ (equ|neq|lss|leq|gtr|geq) \S+) +", re.I)
# numbers, and the options of a program, are the only ones that stand outside of quotes
BARE_VALUE = re.compile(r"%~\w*\d|%\d|%(?!(CODE|VERSION|errorlevel)%)\w+%", re.I)


def commands(line: str) -> list[str]:
    """The first words of what a line runs; anything in quotes is written as two quotes."""
    line = re.sub(r" in \(.*?\)", "", re.sub(r'"[^"]*"', '""', line))
    parts = [part.strip(" @") for part in re.split(r"&&?|\|\|?|[()]|\bdo\b", line)]
    for number, part in enumerate(parts):
        while match := CONDITION.match(part):
            part = part[match.end() :]
        parts[number] = (part.split() or [""])[0].lower().removesuffix(".exe")
    return [part for part in parts if part and not part.startswith(":")]


def faults(content: bytes) -> set[str]:
    """What cmd.exe or a user's machine would trip over in a .bat file."""
    found = set()
    if not content.isascii():
        found.add("not ASCII")  # cmd.exe cuts lines of other text on Chinese code pages; a BOM is a command to it
    if content.count(b"\n") != content.count(b"\r\n") or not content.endswith(b"\r\n"):
        found.add("not CRLF")  # goto misses labels
    lines = content.decode("utf-8", "replace").splitlines()
    if lines[0] != "@echo off":
        found.add("echo is on")
    for line in (line for line in lines if not line.startswith("rem ")):
        for word in commands(line):
            if word in ("python", "pythonw", "py", "pip"):
                found.add("bare python")  # the Store's alias answers to it
            elif word == "call":
                found.add("call")  # expands the arguments a second time
            elif word != '""' and word not in BUILT_IN:
                found.add("bare program")  # another one of that name may come first in PATH
        if any(line[: value.start()].count('"') % 2 == 0 for value in BARE_VALUE.finditer(line)):
            found.add("value without quotes")
    labels = {line[1:].strip().lower() for line in lines if line.startswith(":")} | {"eof"}
    if not {name.lower() for name in re.findall(r"\bgoto :?(\w+)", "\n".join(lines))} <= labels:
        found.add("no such label")
    return found


@pytest.mark.parametrize("path", BATS, ids=lambda path: path.name)
def test_bat_is_what_cmd_reads_safely(path):
    assert faults(path.read_bytes()) == set()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("@echo off\r\necho 你好\r\n", "not ASCII"),
        ("\ufeff@echo off\r\n", "not ASCII"),
        ("@echo off\necho 1\n", "not CRLF"),
        ("@echo off\r\necho 1", "not CRLF"),
        ("echo 1\r\n", "echo is on"),
        ("@echo off\r\npython x.py\r\n", "bare python"),
        ("@echo off\r\nif 1==1 (python.exe x.py)\r\n", "bare python"),
        ("@echo off\r\ncd x && pip install y\r\n", "bare python"),
        ("@echo off\r\ntype x | find 1\r\n", "bare program"),
        ('@echo off\r\ncall "x.bat" %*\r\n', "call"),
        ('@echo off\r\nif exist "x" if not "a"=="b" pip install y\r\n', "bare python"),
        ("@echo off\r\nfor %%P in (a) do ping -n 1 x\r\n", "bare program"),
        ("@echo off\r\ncd /d %~dp0\r\n", "value without quotes"),
        ('@echo off\r\n"x" %PYTHON%\r\n', "value without quotes"),
        ('@echo off\r\nif exist "x" type %USERPROFILE%\\y\r\n', "value without quotes"),
        ('@echo off\r\necho "x" %~f0\r\n', "value without quotes"),
        ("@echo off\r\ngoto end\r\n", "no such label"),
    ],
)
def test_lint_finds(content, fault):
    assert fault in faults(content.encode())


@pytest.mark.parametrize(("name", "arguments"), LAUNCHERS.items())
def test_launcher_hands_everything_on_and_without_the_rest_of_the_program_says_so(name, arguments):
    lines = [line for line in (ROOT / name).read_text(encoding="ascii").splitlines() if not line.startswith("rem ")]
    echo, started, said, *end = lines
    assert (echo, started) == ("@echo off", f'"%~dp0system\\launch.bat" {arguments}%*')
    assert "Unpack the whole zip" in said and end == ["if not defined CI pause", "exit /b 1"]


@pytest.mark.parametrize("name", ["setup_offline.bat", "诊断.bat"])
def test_nothing_is_done_in_a_folder_that_is_not_the_programs(name):
    """Explorer unpacks a single file where somebody starts it in the zip; System32 is then the current folder."""
    lines = (ROOT / name).read_text(encoding="ascii").splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.endswith(" || goto alone")]
    assert lines[at].startswith('cd /d "%~dp0s')
    assert all(line.startswith(("@echo", "rem", "setlocal")) for line in lines[:at])
    assert "Unpack the whole zip" in lines[lines.index(":alone") + 2]


@pytest.mark.parametrize("name", ["system/launch.bat", "setup_offline.bat", "诊断.bat"])
def test_the_working_bats_hand_the_exit_code_out(name):
    text = (ROOT / name).read_text(encoding="ascii")
    assert text.splitlines()[-1] == "exit /b %CODE%"
    assert 'cd /d "%~dp0' in text and "%*" in text and "DisableDelayedExpansion" in text
    assert 'set "PYTHONUTF8=1"' in text and 'set "PYTHONNOUSERSITE=1"' in text
    starts = [line for line in text.splitlines() if line.startswith('"%PYTHON%"')]
    assert starts and all(" -E -s " in line for line in starts), "PYTHONHOME and the user's packages would leak in"


def test_launch_checks_the_options_before_it_installs():
    text = (ROOT / "system" / "launch.bat").read_text(encoding="ascii")
    assert '"%PYTHON%" -E -s -X utf8 "%~dp0install.py" -- %*' in text


def test_the_doctor_needs_no_installation():
    lines = (ROOT / "诊断.bat").read_text(encoding="ascii").splitlines()
    assert '"%PYTHON%" %VERSION% -E -s -X utf8 -m server doctor %*' in lines and "install.py" not in "".join(lines)
    (pause,) = [line for line in lines if line.endswith("pause")]
    assert "CODE" not in pause, "its window stays open when all is well, too"


def test_git_keeps_the_line_ends():
    assert "*.bat text eol=crlf" in (ROOT / ".gitattributes").read_text().splitlines()


@pytest.mark.skipif(not shutil.which("wine"), reason="wine is not installed")
@pytest.mark.parametrize("folder", ["plain", "with space (1) & 模型"])
def test_launchers_without_python_under_wine(folder, tmp_path):
    root = tmp_path / folder
    shutil.copytree(ROOT / "system", root / "system", ignore=shutil.ignore_patterns("python", "wheels"))
    for name in (*LAUNCHERS, "setup_offline.bat", "诊断.bat"):
        shutil.copy(ROOT / name, root)
    told = {**dict.fromkeys((*LAUNCHERS, "诊断.bat"), "setup_offline.bat"), "setup_offline.bat": "python.org"}
    for name, said in told.items():
        bat = "Z:" + str(root / name).replace("/", "\\")
        done = subprocess.run(["wine", bat, "--port", "0"], stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        assert done.returncode == 1 and said.encode() in done.stdout


# run.sh


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A project with a server that prints what it was given, and that needs no packages."""
    root = tmp_path_factory.mktemp("project") / "check out"
    (root / "server").mkdir(parents=True)
    (root / "tests").mkdir()
    shutil.copytree(ROOT / "system", root / "system", ignore=shutil.ignore_patterns("python", "wheels", "__pycache__"))
    shutil.copy(ROOT / "run.sh", root)
    for path in (ROOT / "server").glob("*.py"):
        shutil.copy(path, root / "server")
    (root / "server" / "__main__.py").write_text(ECHO)
    for requirements in (root / "requirements.txt", root / "tests" / "requirements.txt"):
        requirements.write_text("# nothing\n")
    return root


ECHO = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # before the line that the test waits for
print(sys.argv[1:], os.getcwd(), flush=True)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(5)
"""


def call(script: Path | str, *argv: str, **keywords) -> subprocess.CompletedProcess:
    env = {**os.environ, "CHATGLM_LANG": "en", **keywords.pop("env", {})}
    return subprocess.run([script, *argv], capture_output=True, text=True, timeout=120, env=env, **keywords)


@posix
def test_run_from_another_folder_and_through_links(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "one").symlink_to(checkout / "run.sh")
    (tmp_path / "bin" / "two").symlink_to("one")
    done = call(tmp_path / "bin" / "two", "--model", "a b", "--host", "*", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines()[-1] == f"['--model', 'a b', '--host', '*'] {tmp_path}"
    again = call(checkout / "run.sh", cwd=tmp_path)
    assert again.stdout.splitlines() == [f"[] {tmp_path}"]


@posix
def test_run_is_replaced_by_the_server(checkout):
    call(checkout / "run.sh")
    process = subprocess.Popen([checkout / "run.sh", "--model", "wait"], stdout=subprocess.PIPE, text=True)
    assert "wait" in process.stdout.readline()
    process.terminate()
    assert process.wait(10) == 7
    process.stdout.close()


@pytest.fixture
def fresh(tmp_path):
    """A clone in which nothing was installed yet, with the server's real options."""
    root = tmp_path / "fresh clone"
    root.mkdir()
    shutil.copytree(ROOT / "system", root / "system", ignore=shutil.ignore_patterns("python", "wheels", "__pycache__"))
    shutil.copytree(ROOT / "server", root / "server", ignore=shutil.ignore_patterns("__pycache__", "build"))
    shutil.copy(ROOT / "run.sh", root)
    (root / "requirements.txt").write_text("there-is-no-such-package\n")
    return root


@posix
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--help"], 0, "usage: ./run.sh [command] [options]\n  serve "),
        (["chat", "--help"], 0, "usage: ./run.sh"),
        (["-h"], 0, "usage: ./run.sh"),
        (["--version"], 0, "chatglm-portable 0."),
        (["--prot", "1"], 2, "Unknown option --prot on the command line. Did you mean --port?"),
        (["--port", "x"], 2, "--port on the command line cannot be 'x'"),
    ],
)
def test_help_and_mistakes_need_no_installation(fresh, options, code, said):
    done = call("./run.sh", *options, cwd=fresh)
    assert done.returncode == code, done.stderr
    assert (done.stderr if code else done.stdout).startswith(said)
    assert not (done.stdout if code else done.stderr) and not (fresh / ".venv").exists()


@posix
def test_the_doctor_runs_where_nothing_is_installed(fresh):
    done = call("./run.sh", "doctor", "--port", "0", cwd=fresh)
    assert done.returncode == 1 and done.stderr == "" and not (fresh / ".venv").exists()
    assert "missing: there-is-no-such-package" in done.stdout and "problems: " in done.stdout


@posix
def test_run_test_starts_pytest_with_its_arguments(checkout):
    (checkout / "pytest.py").write_text("import os, sys; print(sys.argv[1:], os.getcwd()); sys.exit(3)")
    done = call(checkout / "run.sh", "test", "-k", "a or b", cwd="/")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == f"['-k', 'a or b'] {checkout}"


@posix
def test_run_without_python(tmp_path):
    checkout = tmp_path / "fresh"
    checkout.mkdir()
    shutil.copy(ROOT / "run.sh", checkout)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # too old, or the Store's placeholder
    (tools / "python3").chmod(0o755)
    done = call(checkout / "run.sh", env={"PATH": str(tools)})
    assert done.returncode == 1
    assert "Python 3.10" in done.stderr and "请先安装" in done.stderr and "apt install" in done.stderr


@posix
def test_ci_says_what_the_readme_says():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0].startswith("#!") and lines[-2:] == ["./run.sh test", "exec ./run.sh test --windows"]
    assert "./run.sh test" in (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("run.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)


def test_shell_scripts_are_small():
    assert len((ROOT / "run.sh").read_text(encoding="utf-8").splitlines()) <= 40

"""The launchers as users start them: everywhere, in whatever state their machine is."""

import json
import re
import shutil
import socket
import time
import zipfile

import pytest

from server.kernels.build import VARIANTS
from tests.conftest import ROOT
from tests.windows.bundle import Bundle, Running, kept_window
from tests.windows.conftest import free_port

SMALL = "start_small_vram.bat"


@pytest.fixture(scope="module")
def browser(rig):
    """What makes the program believe that it has a browser, and the file where that writes the addresses."""
    log = rig.lab / "browser.log"
    log.unlink(missing_ok=True)
    return {"BROWSER": r"Z:\lab\shims\browser.exe", "BROWSER_LOG": r"Z:\lab\browser.log"}, log


@pytest.fixture(scope="module")
def server(bundle, browser):
    """One that several tests ask, on code page 936 and with a browser."""
    with Running(bundle, SMALL, "--port", str(free_port()), "--log-level", "debug", env=browser[0]) as running:
        yield running


@pytest.mark.parametrize(("page", "bat"), [(65001, "start_medium_vram.bat"), (1252, "start_large_vram.bat")])
def test_other_code_pages_and_launchers_and_a_clean_end(bundle, port, page, bat):
    """Ctrl+C cannot be pressed here; the spool's quit.flag takes the same way out."""
    with Running(bundle, bat, "--port", str(port), "--spool", "spool", page=page) as server:
        *_, last = server.events("你好", answer_prefix="你")
        assert "演示模型" in last["response"]
        assert "模型🙂" in server.text or page == 1252  # the folder's name
        (bundle.root / "spool" / "flags" / "quit.flag").touch()
        assert server.end() == 0
        assert not kept_window(server.text) and re.search("正在停止|stopping", server.text)


def test_polluted_environment_and_arguments(bundle, port, tmp_path):
    """Another Python's settings, packages of the user's, and what people type behind a launcher's name."""
    leak = bundle.rig.lab / "leak"
    users = bundle.rig.lab / "prefix/drive_c/users/root/AppData/Roaming/Python/Python311/site-packages"
    for folder in (leak, users):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("torch", "flask", "usercustomize", "sitecustomize"):
            (folder / f"{name}.py").write_text("print('LEAKED', flush=True)\nraise SystemExit(99)\n")
    env = {"PYTHONPATH": r"Z:\lab\leak", "PYTHONHOME": r"C:\Python27", "PYTHONSTARTUP": r"Z:\lab\leak\torch.py",
           "PYTHONIOENCODING": "ascii:strict", "PYTHONUSERBASE": r"Z:\lab\leak"}  # fmt: skip
    try:
        (bundle.python / "python311._pth").rename(tmp_path / "kept")  # what some guides tell people to do
        with Running(bundle, SMALL, "--port", str(port), "--host", "0.0.0.0", env=env) as server:
            *_, last = server.events("你好", answer_prefix="你")
            assert "演示模型" in last["response"] and "LEAKED" not in server.text
            assert f":{port}" in server.url and "局域网：http://" in server.text
            assert "python311._pth" in server.text and (bundle.python / "python311._pth").is_file()
    finally:
        for folder in (leak, users):
            for path in folder.glob("*.py"):
                path.unlink()


def test_ready_made_kernels_compute(bundle, server):
    """The bundle needs no compiler: its own library is loaded, and none is compiled."""
    *_, last = server.events("你好", answer_prefix="你")
    assert "演示模型" in last["response"]
    assert not (bundle.root / "server/kernels/cpu/build").exists()
    code = "from server.kernels import build; from server.kernels.cpu_ops import CpuOps; print(CpuOps(2).name, "
    code += "build.find_compiler(), build._ready().is_file())"
    content = (bundle.root / "server/kernels/cpu/ready/cpu-amd64.dll").read_bytes()
    assert all(f"linear_{variant}\0".encode() in content for variant in VARIANTS)
    name, compiler, ready = bundle.ask_python(code).splitlines()[-1].split()
    assert name.startswith("cpu-") and name != "cpu-plain" and (compiler, ready) == ("None", "True")


def test_interrupt_keeps_what_was_said(server):
    # a penalty far below 1 makes the model repeat itself for ever: only the interruption can end this answer
    events = server.events("你好", answer_prefix="一、二、三、", max_length=2048, repetition_penalty=0.05)
    said = [next(events)["response"] for _ in range(5)]
    assert server.post("/interrupt").status == 200
    said += [event["response"] for event in events]
    assert said[0].startswith("一、二、三、") and said[-1].startswith(said[4])
    tokens = int(server.wait_for(r"answer (\d+) tokens, .*abort")[1])
    assert 0 < tokens < 1500


def test_second_double_click_opens_the_page(bundle, server, browser):
    env, log = browser
    port = server.url.rpartition(":")[2]
    _wait_for_lines(log, 1)
    second = bundle.run("start_large_vram.bat", "--port", port, "--model", "demo", env=env)
    assert second.returncode == 0 and "已经在运行" in second.stdout
    assert _wait_for_lines(log, 2) == [server.url, server.url]
    quiet = bundle.run(SMALL, "--port", port, "--model", "demo", "--no-browser")
    assert quiet.returncode == 2 and f"端口 {port}" in quiet.stdout
    *_, last = server.events("你好")
    assert last["response"], "the first one goes on"


def _wait_for_lines(path, count: int) -> list[str]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and len(lines := path.read_text().split()) >= count:
            return lines
        time.sleep(0.1)
    raise AssertionError(f"{path} has no {count} lines")


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--port", "x"], "--port"), (["--prot", "1"], "--port"), (["--model", "不存在"], "不存在")]
)
def test_failures_keep_the_window_and_give_the_exit_code(bundle, arguments, said):
    done = bundle.run(SMALL, *arguments)
    assert done.returncode == 2
    assert said in done.stdout and "Traceback" not in done.stdout
    assert kept_window(done.stdout)
    unattended = bundle.run(SMALL, *arguments, env={"CI": "1"})
    assert unattended.returncode == 2 and not kept_window(unattended.stdout)


@pytest.mark.parametrize("bat", ["start_small_vram.bat", "setup_offline.bat", "诊断.bat"])
def test_a_launcher_without_the_program_says_so(bundle, bat):
    """What Explorer does when it is started within the zip, and what people do who copy it to their desktop."""
    alone = Bundle(bundle.rig, bundle.rig.lab / "Temp1 (alone)")
    shutil.rmtree(alone.root, ignore_errors=True)
    alone.root.mkdir()
    shutil.copy(bundle.root / bat, alone.root)
    before = {path.name for path in bundle.rig.system32.iterdir()}
    done = alone.run(bat)
    assert done.returncode == 1 and "Unpack the whole zip" in done.stdout and kept_window(done.stdout), done.stdout
    assert [path.name for path in alone.root.iterdir()] == [bat]
    assert {path.name for path in bundle.rig.system32.iterdir()} == before


def test_port_of_another_program(bundle):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = bundle.run(SMALL, "--model", "demo", "--port", str(other.getsockname()[1]))
    assert done.returncode == 2 and "--port" in done.stdout and kept_window(done.stdout)


def test_help_of_every_launcher(bundle):
    for bat in sorted(ROOT.glob("*.bat")):
        if bat.name.startswith(("start_", "开启")):
            done = bundle.run(bat.name, "--help")
            assert done.returncode == 0 and "--port" in done.stdout, bat.name


def test_doctor(bundle):
    done = bundle.run("诊断.bat", "--model", "demo", "--port", "0", "--zip")
    assert done.returncode in (0, 1) and kept_window(done.stdout), done.stdout
    for words in ("自带的", "the bundle's", "5 of 5 DLLs are", "built for CPU", "ChatGLM2, complete", "compiled: "):
        assert words in done.stdout, done.stdout
    (packed,) = bundle.root.glob("doctor-*.zip")
    with zipfile.ZipFile(packed) as file:
        checks = json.loads(file.read("doctor.json"))["checks"]
    packed.unlink()
    assert not [check for check in checks if {"traceback", "timeout"} & set(check["facts"])], checks

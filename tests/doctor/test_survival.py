"""What the doctor survives: a broken installation, odd programs and settings, outputs that nobody reads."""

import json
import os
import shlex
import signal
import subprocess
import time

import psutil
import pytest

from server.doctor import command
from tests.conftest import ROOT
from tests.doctor.process import IDS, call, posix, results


@posix
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("raise OSError('[WinError 126] Error loading c10.dll')", "VC++ runtime"),
        ("raise OSError('[WinError 1455] page file')", "Virtual memory"),
        ("raise RuntimeError('torch is odd')", "torch is odd"),
    ],
)
def test_a_torch_that_does_not_load_is_a_result(bare, packages, code, words):
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text(code)
    done = call(bare, "--model", "demo", "--port", "0", "--json")
    found = results(done)
    assert done.returncode == 1 and found["torch"]["state"] == "problem"
    assert words in found["torch"]["finding"]["en"] + found["torch"]["advice"]["en"]
    assert found["profile"]["state"] == "ok"


@posix
def test_checks_that_cannot_look_are_results(bare, copy):
    """No requirements, no model, a driver library that ends its process: each costs its own check."""
    (copy / "requirements.txt").unlink()
    done = call(bare, "--model", "no-such-model", "--port", "0", "--json", root=copy)
    found = results(done)
    assert done.returncode == 1 and list(found) == IDS
    assert "requirements.txt cannot be read (No such file or directory)" in found["packages"]["finding"]["en"]
    assert "There is no model no-such-model" in found["model"]["finding"]["en"]
    assert found["memory"]["state"] != "problem"


@pytest.mark.parametrize("text", ["port = 'x", "[[[[", "\udcff", "nonsense = 1", "x = " + "[" * 100_000])
def test_a_configuration_of_no_sense_is_a_sentence(tmp_path, text):
    (tmp_path / "config.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    config, wrong = command.read_options(["doctor", "--port", "7"], env={}, root=tmp_path)
    assert config.port == 7 and "config.toml" in wrong.en and "config.toml" in wrong.zh


def test_a_configuration_that_python_310_cannot_read_yet(tmp_path, monkeypatch):
    def parse(argv, root=None, **options):
        if (root / "config.toml").exists():
            raise ImportError("No module named 'tomli'")
        return real(argv, root=root, **options)

    real = command.parse
    monkeypatch.setattr(command, "parse", parse)
    (tmp_path / "config.toml").touch()
    config, wrong = command.read_options(["doctor", "--port", "7"], env={}, root=tmp_path)
    assert config.port == 7 and "tomli" in wrong.en


@posix
def test_outputs_that_nobody_reads(bare):
    """Closed from the start, left in the middle, or on a full disk: no traceback."""
    command = f"{shlex.quote(str(bare))} -m server doctor --model demo --port 0"
    for redirected, code, said in ((">&-", 1, ""), (">&- 2>&-", 1, ""), ("| head -n 1", 0, ""),
                                   (">/dev/full", 2, "The results cannot be written (No space left on device)")):
        done = subprocess.run(f"{command} {redirected}", shell=True, cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "CHATGLM_LANG": "en"})  # fmt: skip
        assert done.returncode == code and done.stderr.startswith(said), done
        assert "Traceback" not in done.stderr and (said or done.stderr == "")


@posix
def test_json_is_ascii_and_the_page_readable_in_any_encoding(bare):
    done = call(bare, "--model", "demo", "--port", "0", "--json", PYTHONIOENCODING="gbk", PYTHONUTF8="0")
    assert done.stdout.isascii() and json.loads(done.stdout)["checks"][0]["title"]["zh"] == "系统"
    done = call(bare, "--model", "demo", "--port", "0", PYTHONIOENCODING="cp1252", PYTHONUTF8="0", CHATGLM_LANG="zh")
    assert "?" not in done.stdout and "[ok] system" in done.stdout


@posix
@pytest.mark.parametrize(
    ("answer", "said"),
    [("echo 'Erreur: 显卡'", "names no GPU"), ("head -c 200000 /dev/zero | tr '\\0' x", "names no GPU"),
     ("echo 0, GPU-1, GB10, [N/A], [N/A], 12.1, 580.1", "names no GPU"), ("kill -9 $$", "names no GPU"),
     ("echo 0, GPU-1, NVIDIA RTX 3060, 12288, 11264, 8.6, 560.35", "compute capability 8.6, 11.0 GiB of 12.0 GiB")],
)  # fmt: skip
def test_whatever_nvidia_smi_says(bare, tmp_path, answer, said):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = results(call(bare, "--model", "demo", "--port", "0", "--json", PATH=path, CUDA_VISIBLE_DEVICES=""))
    assert said in found["gpu"]["finding"]["en"] and found["torch"]["finding"]["en"].startswith("not installed")


@posix
def test_ctrl_c_ends_it(bare, packages):
    (packages / "torch").mkdir()
    noted = packages / "pid.txt"
    code = f"import os, time; open({str(noted)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(100)"
    (packages / "torch" / "__init__.py").write_text(code)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CHATGLM_", "PYTHON"))}
    process = subprocess.Popen([bare, "-m", "server", "doctor", "--model", "demo"], cwd=ROOT, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while "GPU" not in process.stdout.readline():
        assert process.poll() is None
    while not noted.is_file() or not noted.read_text().endswith(" "):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and errors == ""
    pid, deadline = int(noted.read_text()), time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process that loads PyTorch lives on"
        time.sleep(0.05)

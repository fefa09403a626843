"""system/install.py with real venvs and a real pip, which takes its packages from a folder of tiny wheels."""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("system_install", ROOT / "system" / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def make_wheel(folder: Path, name: str, version: str, module: str = "") -> None:
    """A wheel with one module."""
    contents = {
        f"{name}.py": module or f"version = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    record_path = f"{name}-{version}.dist-info/RECORD"
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**contents, record_path: record + f"{record_path},,\n"}.items():
            archive.writestr(path, text)


@pytest.fixture
def project(tmp_path):
    """A checkout that needs the package ``one``; the index of packages is the folder ``index``."""
    pytest.importorskip("venv", reason="an embeddable Python has none, and needs none")
    root = tmp_path / "项目 (1)"
    (root / "system").mkdir(parents=True)
    shutil.copy(ROOT / "system" / "install.py", root / "system")
    (root / "server").mkdir()
    for name in ("__init__.py", "i18n.py"):
        shutil.copy(ROOT / "server" / name, root / "server")
    (root / "tests").mkdir()
    (root / "tests" / "requirements.txt").write_text("two==1\n")
    (root / "requirements.txt").write_text("one==1\n")
    make_wheel(tmp_path / "index", "one", "1")
    make_wheel(tmp_path / "index", "one", "2")
    make_wheel(tmp_path / "index", "two", "1")
    return root


def environment(root: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (root.parent / "index").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    return {**kept, **index, "CHATGLM_LANG": "en", "PYTHONUTF8": "1", **more}


def run(root: Path, *argv: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "system" / "install.py"), *argv]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(root, **env), timeout=120)


def ask(root: Path, code: str) -> str:
    python = install.venv_python(root / ".venv")
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_installs_once_and_again_when_the_file_changes(project):
    first = run(project)
    assert first.returncode == 0, first.stderr
    assert first.stderr == "" and first.stdout.splitlines() == ["Making .venv ...", "Installing the other packages ..."]
    assert ask(project, "import one; print(one.version)") == "1"

    started = time.perf_counter()
    second = run(project)
    assert (second.returncode, second.stdout) == (0, "")
    assert time.perf_counter() - started < 2

    (project / "requirements.txt").write_text("one==2\n")
    third = run(project)
    assert third.returncode == 0 and "Making .venv" not in third.stdout
    assert ask(project, "import one; print(one.version)") == "2"


def test_with_tests(project):
    assert run(project).returncode == 0
    assert "ModuleNotFoundError" in ask(project, "import two")
    assert run(project, "--with-tests").returncode == 0
    assert ask(project, "import two; print(two.version)") == "1"
    assert run(project).stdout == ""
    noted = json.loads((project / ".venv" / "installed.json").read_text())
    assert set(noted) == {"requirements.txt", "tests/requirements.txt"}


def test_failure_shows_pips_error_and_one_sentence(project):
    (project / "requirements.txt").write_text("one==7\n")
    done = run(project)
    assert done.returncode == 1
    assert "No matching distribution found for one==7" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("The installation failed") and "Traceback" not in done.stderr
    zh = run(project, CHATGLM_LANG="zh")
    assert zh.stderr.splitlines()[-1].startswith("安装没有成功")
    # what worked before still does, and a later start tries again
    (project / "requirements.txt").write_text("one==1\n")
    assert "Making .venv" not in run(project).stdout
    assert ask(project, "import one; print(one.version)") == "1"


@pytest.mark.skipif(os.name == "nt", reason="kills with a POSIX signal")
def test_killed_installation_is_repaired(project):
    # a source package whose build does not end, so that the kill comes in the middle
    slow = project.parent / "slow"
    slow.mkdir()
    (slow / "setup.py").write_text("import time; time.sleep(60)")
    backend = "[build-system]\nrequires = []\nbuild-backend = 'setup'\nbackend-path = ['.']\n"
    (slow / "pyproject.toml").write_text(backend)
    (project / "requirements.txt").write_text(f"one==1\n{slow.as_uri()}\n")
    command = [sys.executable, str(project / "system" / "install.py")]
    process = subprocess.Popen(command, env=environment(project), stdout=subprocess.DEVNULL, start_new_session=True)
    marker = project / ".venv" / "installing"
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert marker.exists()
    (project / "requirements.txt").write_text("one==1\n")
    done = run(project)
    assert done.returncode == 0 and "Making .venv" in done.stdout
    assert not marker.exists() and ask(project, "import one; print(one.version)") == "1"


def test_half_made_venv_is_made_anew(project):
    python = install.venv_python(project / ".venv")
    python.parent.mkdir(parents=True)
    python.write_text("")
    assert run(project).returncode == 0
    assert ask(project, "import one; print(one.version)") == "1"


def test_wheels_of_the_bundle_come_first(project):
    make_wheel(project / "system" / "wheels", "one", "1", module="version = 'from the bundle'\n")
    done = run(project, PIP_FIND_LINKS="")
    assert done.returncode == 0, done.stderr
    assert "system/wheels" in done.stdout
    assert ask(project, "import one; print(one.version)") == "from the bundle"


def test_incomplete_wheels_are_completed_from_the_index(project):
    make_wheel(project / "system" / "wheels", "one", "1", module="version = 'from the bundle'\n")
    done = run(project, "--with-tests")
    assert done.returncode == 0, done.stderr
    assert ask(project, "import two; print(two.version)") == "1"


def test_pytorch_comes_before_the_rest_and_stays(project):
    make_wheel(project.parent / "index", "torch", "2.0+cpu", module="build = 'cpu'\n")
    (project / "requirements.txt").write_text("torch==2.0  # pinned\none==1\n")
    nowhere = str(project.parent)  # no nvidia-smi on this PATH
    done = run(project, PATH=nowhere)
    assert done.returncode == 0, done.stderr
    assert ask(project, "import torch; print(torch.build)") == "cpu"
    (project / "requirements.txt").write_text("torch==2.0\none==2\n")
    again = run(project, PATH=nowhere)
    assert again.returncode == 0 and "PyTorch" not in again.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index's default is the build for the CPU")
def test_default_build_of_pytorch_is_the_last_resort(project):
    make_wheel(project.parent / "index", "torch", "2.0", module="build = 'default'\n")
    (project / "requirements.txt").write_text("torch==2.0\n")
    done = run(project, PATH=str(project.parent))
    assert done.returncode == 0, done.stderr
    assert "PyTorch's own index" in done.stdout and "the package index's default, about 2 GB" in done.stdout


def attempts(gpu, system="linux"):
    return [(a.requirement, *a.options[1:]) for a in install.torch_attempts("2.13.0", gpu, system)]


CPU = "https://download.pytorch.org/whl/cpu"
CU126, CU130 = CPU[:-3] + "cu126", CPU[:-3] + "cu130"


@pytest.mark.parametrize(
    ("gpu", "system", "expected"),
    [
        (None, "linux", [("torch==2.13.0+cpu",), ("torch==2.13.0+cpu", CPU), ("torch==2.13.0",)]),
        (None, "win32", [("torch==2.13.0",)]),
        (None, "darwin", [("torch==2.13.0",)]),
        ((580, (8, 6)), "linux", [("torch==2.13.0+cu130", CU130), ("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((580, (8, 6)), "win32", [("torch==2.13.0+cu130", CU130), ("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((580, (6, 1)), "win32", [("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((551, (8, 9)), "linux", [("torch==2.13.0+cu126", CU126), ("torch==2.13.0",)]),
        ((470, (3, 5)), "linux", [("torch==2.13.0+cpu",), ("torch==2.13.0+cpu", CPU), ("torch==2.13.0",)]),
    ],
)  # fmt: skip
def test_build_of_pytorch_for_this_machine(gpu, system, expected):
    assert attempts(gpu and install.Gpu(*gpu), system) == expected


def test_pin_is_read_from_the_file():
    assert install.torch_pin(ROOT / "requirements.txt") == "2.13.0"


@pytest.mark.skipif(os.name == "nt", reason="a script is not a program on Windows")
@pytest.mark.parametrize(
    ("output", "gpu"),
    [
        ("580.65.06, 8.6\n", (580, (8, 6))),
        ("551.23, 6.1\n551.23, 8.9\n", (551, (8, 9))),
        ("NVIDIA-SMI has failed\n", None),
        ("", None),
    ],
)
def test_gpu_is_asked_of_nvidia_smi(output, gpu, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({output!r}, end='')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.find_gpu() == gpu


def test_old_python_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    with pytest.raises(install.Failure, match=r"3\.10"):
        install._check_python()

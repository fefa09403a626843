"""system/install.py with real venvs and a real pip, which takes its packages from a folder of tiny wheels."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.wheels import make_wheel

spec = importlib.util.spec_from_file_location("system_install", ROOT / "system" / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """An empty environment with pip: making one takes longer than anything else here."""
    pytest.importorskip("venv", reason="an embeddable Python has none, and needs none")
    home = tmp_path_factory.mktemp("made") / ".venv"
    install.make_venv(home)
    return home


@pytest.fixture
def bare(tmp_path):
    """A checkout that needs the package ``one``; the index of packages is the folder ``index``."""
    pytest.importorskip("venv", reason="an embeddable Python has none, and needs none")
    root = tmp_path / "项目 (1)"
    for folder in ("system", "server"):
        (root / folder).mkdir(parents=True)
        for path in (ROOT / folder).glob("*.py"):
            shutil.copy(path, root / folder)
    (root / "tests").mkdir()
    (root / "tests" / "requirements.txt").write_text("two==1\n")
    (root / "requirements.txt").write_text("one==1\n")
    make_wheel(tmp_path / "index", "one", "1")
    make_wheel(tmp_path / "index", "one", "2")
    make_wheel(tmp_path / "index", "two", "1")
    return root


@pytest.fixture
def project(bare, venv):
    """The same with an environment in which nothing is installed yet."""
    shutil.copytree(venv, bare / ".venv", symlinks=True)
    return bare


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


def test_installs_once_and_again_when_the_file_changes(bare):
    first = run(bare)
    assert first.returncode == 0, first.stderr
    assert first.stderr == "" and first.stdout.splitlines() == ["Making .venv ...", "Installing the other packages ..."]
    assert ask(bare, "import one; print(one.version)") == "1"

    second = run(bare)
    assert (second.returncode, second.stdout) == (0, "")

    (bare / "requirements.txt").write_text("one==2\n")
    third = run(bare)
    assert third.returncode == 0 and "Making .venv" not in third.stdout
    assert ask(bare, "import one; print(one.version)") == "2"


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


# installations that are cut short, and two at once

BACKEND = """
import shutil, time
from pathlib import Path
def build_wheel(folder, *_):
    until = time.monotonic() + 120
    while not Path(__file__).with_name("go").exists() and time.monotonic() < until:
        time.sleep(0.05)
    wheel = next(Path(__file__).parent.glob("*.whl"))
    shutil.copy(wheel, folder)
    return wheel.name
"""


@pytest.fixture
def slow(project):
    """The project needs a source package as well, which is built only once the file ``go`` is in this folder."""
    folder = project.parent / "slow"
    make_wheel(folder, "slow", "1")
    (folder / "setup.py").write_text(BACKEND)
    system = "[build-system]\nrequires = []\nbuild-backend = 'setup'\nbackend-path = ['.']\n"
    (folder / "pyproject.toml").write_text(system + "[project]\nname = 'slow'\nversion = '1'\n")
    (project / "requirements.txt").write_text(f"one==1\n{folder.as_uri()}\n")
    return folder


def start(root: Path) -> subprocess.Popen:
    command = [sys.executable, str(root / "system" / "install.py")]
    return subprocess.Popen(command, env=environment(root), stdout=subprocess.PIPE, encoding="utf-8",
                            start_new_session=True)  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_second_installation_waits_for_the_first(project, slow):
    with start(project) as first:
        wait_for(project / ".venv" / "installing")
        kept = project / ".venv" / "kept"
        kept.touch()
        with start(project) as second:
            try:
                said = second.stdout.readline()
            finally:
                (slow / "go").touch()
            assert said.startswith("Another installation is running")
            assert second.stdout.read() == "" and second.wait(120) == 0
        assert first.stdout.read().startswith("Installing") and first.wait(120) == 0
    assert kept.exists() and ask(project, "import one, slow; print(one.version, slow.version)") == "1 1"


@pytest.mark.skipif(os.name == "nt", reason="kills with a POSIX signal")
def test_pip_of_a_killed_installation_is_waited_for(project, slow):
    with start(project) as first:
        wait_for(project / ".venv" / "installing")
        wait_for_pip(first.pid)
        first.kill()
        first.wait()
        with start(project) as second:
            try:
                said = second.stdout.readline()
            finally:
                (slow / "go").touch()
            assert said.startswith("Another installation is running")
            assert "was not finished" in second.stdout.read() and second.wait(120) == 0
    assert ask(project, "import one, slow; print(one.version, slow.version)") == "1 1"


def wait_for_pip(installer: int) -> None:
    psutil = pytest.importorskip("psutil")
    deadline = time.monotonic() + 120
    while not any("install" in child.cmdline() for child in psutil.Process(installer).children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="kills with a POSIX signal")
def test_killed_installation_is_gone_on_with(project, slow):
    with start(project) as process:
        wait_for(project / ".venv" / "installing")
        os.killpg(process.pid, signal.SIGKILL)
    kept = project / ".venv" / "kept"
    kept.touch()
    (project / "requirements.txt").write_text("one==1\n")
    done = run(project)
    assert done.returncode == 0 and "was not finished" in done.stdout
    assert kept.exists() and not (project / ".venv" / "installing").exists()
    assert ask(project, "import one; print(one.version)") == "1"


def half_a_file(site: Path) -> None:
    (site / "one.py").write_text("vers")


def no_file(site: Path) -> None:
    (site / "one.py").unlink()


def no_record(site: Path) -> None:
    (site / "one-1.dist-info" / "RECORD").unlink()
    no_file(site)


def record_of_the_wheel(site: Path) -> None:
    """pip unpacks the wheel's own RECORD like any file, and writes the real one last."""
    record = site / "one-1.dist-info" / "RECORD"
    record.write_text("one-1.dist-info/RECORD,,\n")
    no_file(site)


def old_one_put_aside(site: Path) -> None:
    (site / "one-1.dist-info").rename(site / "~ne-1.dist-info")
    no_file(site)


def test_half_installed_packages_are_installed_again_and_whole_ones_are_not(project):
    assert run(project, "--with-tests").returncode == 0
    site = Path(ask(project, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    whole = (site / "two-1.dist-info").stat().st_mtime_ns
    for damage in (half_a_file, no_file, no_record, record_of_the_wheel, old_one_put_aside):
        damage(site)
        (project / ".venv" / "installing").touch()
        done = run(project)
        assert done.returncode == 0, done.stderr
        assert "Making .venv" not in done.stdout and not list(site.glob("~*"))
        assert ask(project, "import one; print(one.version)") == "1", damage
    assert (site / "two-1.dist-info").stat().st_mtime_ns == whole


def test_folder_that_cannot_be_written(project):
    (project / "system" / "install.lock").mkdir()
    done = run(project)
    assert done.returncode == 1 and done.stderr.startswith("Cannot write to ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [["--help"], ["-h"], ["serve", "--version"], ["--prot", "1"], ["--port", "x"]])
def test_nothing_is_installed_for_help_and_mistakes(bare, options):
    done = run(bare, "--", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (bare / ".venv").exists()


def test_config_file_that_cannot_be_read_yet_is_no_mistake(monkeypatch, tmp_path):
    """Python 3.10 reads TOML only once the packages are installed."""
    (tmp_path / "my.toml").write_text("port = 1\n")
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))
    monkeypatch.setitem(sys.modules, "tomli", None)  # as if it were not there
    assert install.will_serve(["--config", str(tmp_path / "my.toml")])
    assert not install.will_serve(["--config", str(tmp_path / "my.toml"), "--port", "x"])
    assert not install.will_serve(["--help"])


def test_half_made_venv_is_made_anew(bare):
    python = install.venv_python(bare / ".venv")
    python.parent.mkdir(parents=True)
    python.write_text("")
    assert run(bare).returncode == 0
    assert ask(bare, "import one; print(one.version)") == "1"


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


def test_old_python_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    with pytest.raises(install.Failure, match=r"3\.10"):
        install._check_python()

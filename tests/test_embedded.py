"""system/embedded.py with this Python's own pip, and servers on this machine; tests/windows runs the real one."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest

from server.converted import sha256
from system import embedded
from system.install import venv_python
from system.repair import forget_half_installed
from tests.conftest import ROOT
from tests.wheels import make_pip_app, make_wheel


def test_paths_are_written_once(tmp_path):
    assert embedded.write_paths(tmp_path) and not embedded.write_paths(tmp_path)
    (tmp_path / embedded.PTH).write_text("python311.zip\n.\nimport site\n")
    assert embedded.write_paths(tmp_path)
    lines = (tmp_path / embedded.PTH).read_bytes().split(b"\r\n")
    assert b"..\\.." in lines and b"import site" not in lines and lines[-1] == b""


@pytest.fixture(scope="module")
def pip_site(tmp_path_factory):
    """This Python's own pip as an index has it, and as PyPA's zip application, which has no dist-info."""
    root = tmp_path_factory.mktemp("site")
    pip = distribution("pip")
    names = [str(file) for file in pip.files if file.parts[0] != ".." and file.suffix != ".pyc"]
    info = f"pip-{pip.version}.dist-info"
    names = [name for name in names if name.startswith("pip/") or name in (f"{info}/METADATA", f"{info}/WHEEL")]
    (root / "simple" / "pip").mkdir(parents=True)
    wheel = root / f"pip-{pip.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(pip.locate_file(name), name)
        rows = [f"{name},,{pip.locate_file(name).stat().st_size}\n" for name in names]
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    make_pip_app(wheel, root / "pip.pyz")
    page = "".join(f'<a href="../../{name}#sha256=0">{name}</a>' for name in ("pip-8-py3-none-any.whl", wheel.name))
    (root / "simple" / "pip" / "index.html").write_text(page)
    server = serve(root)
    yield SimpleNamespace(root=root, wheel=wheel, version=pip.version, url=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def serve(root):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *request):
            super().__init__(*request, directory=str(root))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


ADD_PIP = """
import sys
from pathlib import Path
from system.environment import Environment, Failure
python, lock, wheels = map(Path, sys.argv[1:])
environment = Environment(python, Path.cwd(), False, lock)
try:
    environment.add_pip(wheels)
except (Failure, OSError, LookupError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
assert environment.has_pip()
"""


def lock_of(pip_site, digest):
    lock = pip_site.root / f"{digest}.txt"
    lock.write_text(f"pip=={pip_site.version} \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{digest}\n")
    return lock


@pytest.fixture
def add_pip(pip_site, tmp_path):
    """Gives pip to a Python that has none; returns what was said in the end."""
    python = tmp_path / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True)

    def add(digest: str, **env: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        paths = (venv_python(python), lock_of(pip_site, digest), tmp_path / "none")
        command = [sys.executable, "-c", ADD_PIP, *map(str, paths)]
        done = subprocess.run(command, env={**kept, "PIP_CONFIG_FILE": os.devnull, **env}, cwd=ROOT, text=True,
                              capture_output=True, timeout=120)  # fmt: skip
        return "".join(done.stderr.splitlines()[-1:])

    add.site = next(python.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"))
    return add


def test_pip_comes_from_the_index_that_is_configured(pip_site, add_pip):
    assert add_pip(sha256(pip_site.wheel), PIP_INDEX_URL=f"{pip_site.url}/simple") == ""
    forget_half_installed(add_pip.site)
    assert list(add_pip.site.glob("pip-*")), "a whole one stays"


def test_pip_that_cannot_be_had_is_not_run(pip_site, tmp_path, monkeypatch):
    right, wrong = lock_of(pip_site, sha256(pip_site.wheel)), lock_of(pip_site, "1" * 64)
    monkeypatch.setenv("PIP_INDEX_URL", f"{pip_site.url}/simple")
    with pytest.raises(LookupError, match="SHA-256"):
        embedded.find_pip(wrong, pip_site.root, tmp_path)
    for nowhere in ("http://127.0.0.1:9/", "no address", f"{pip_site.url}/none"):
        monkeypatch.setenv("PIP_INDEX_URL", nowhere)
        with pytest.raises(OSError):
            embedded.find_pip(right, tmp_path / "none", tmp_path)


def test_pip_comes_by_its_own_program_where_no_index_is_configured(pip_site, add_pip):
    """Where that program looks for the wheel is pip's own affair: here it is told by its settings."""
    bootstrap = {"BOOTSTRAP_PIP_URL": f"{pip_site.url}/pip.pyz"}
    settings = {**bootstrap, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pip_site.root)}
    assert add_pip("1" * 64, **settings).startswith("Failure: "), "the lock's hashes hold"
    assert not list(add_pip.site.glob("pip*"))
    assert add_pip(sha256(pip_site.wheel), **settings) == "" and list(add_pip.site.glob("pip-*"))


def test_index_is_the_one_that_pip_would_ask(tmp_path):
    assert embedded.package_index({}) is None
    assert embedded.package_index({"PIP_INDEX_URL": "http://a/simple"}) == "http://a/simple"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip.ini").write_text("\ufeff[global]\nindex-url = http://b/simple%20x\n", encoding="utf-8")
    assert embedded.package_index({"APPDATA": str(tmp_path)}) == "http://b/simple%20x"
    (tmp_path / "pip" / "pip.ini").write_text("no section\n")
    assert embedded.package_index({"APPDATA": str(tmp_path)}) is None


def test_folder_that_is_too_deep(tmp_path):
    assert embedded.path_excess(tmp_path) == 0
    (tmp_path / "manifest.json").write_text(json.dumps({"longest_path": 259 - len(str(tmp_path))}))
    assert embedded.path_excess(tmp_path) == 1


@pytest.mark.skipif(os.name == "nt", reason="a script is not a program on Windows")
def test_bundle_without_pip_and_pytorch_is_completed_and_says_which_build_it_took(pip_site, tmp_path):
    root = tmp_path / "整合包 (1)"
    for folder in ("system", "server"):
        shutil.copytree(ROOT / folder, root / folder, ignore=lambda _, names: {n for n in names if n[-3:] != ".py"})
    make_wheel(root / "system" / "wheels", "torch", "2.0")
    shutil.copy(pip_site.wheel, root / "system" / "wheels")
    (root / "requirements.txt").write_text("torch==2.0\n")
    pins = {wheel.name.split("-")[0]: wheel for wheel in (root / "system" / "wheels").iterdir()}
    lock = [f"{name}=={wheel.name.split('-')[1]} --hash=sha256:{sha256(wheel)}\n" for name, wheel in pins.items()]
    (root / "system" / "windows-lock.txt").write_text("".join(lock))
    python = root / "system" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True)

    def install(gpu: str, *options: str) -> str:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{gpu}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        env = {"PATH": f"{tmp_path}", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "CHATGLM_LANG": "en"}
        command = [str(venv_python(python)), str(root / "system" / "install.py"), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = install("580.65, 8.6")
    assert "Installing pip" in said and "cu130" in said and "was not found, so that for the CPU is used" in said
    assert install("580.65, 8.6") == ""
    (site,) = python.glob("lib/python*/site-packages")
    # a file that pip loads at once, and one of which only its RECORD tells
    for file, options in (("cache.py", ()), ("commands/search.py", ("--repair",))):
        for path in (site / "pip" / "_internal" / file, site / "torch.py", python / "installed.json"):
            path.unlink()
        said = install("470.14, 8.6", *options)
        assert "Installing pip" in said and (site / "pip" / "_internal" / file).is_file()
        assert (site / "torch.py").is_file() == bool(options)
        (site / "torch.py").touch()
    assert "driver 470 is too old (PyTorch for the GPU needs 525" in said

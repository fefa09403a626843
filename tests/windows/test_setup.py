"""setup_offline.bat: completes and repairs, from system/wheels or an index on this machine, also without any Python."""

import hashlib
import shutil
import zipfile

import pytest

from system import embedded
from tests.conftest import ROOT
from tests.wheels import make_pip_app, make_wheel
from tests.windows import rig as rigs
from tests.windows.bundle import Bundle, Running, kept_window
from tests.windows.conftest import unpack

SETUP = "setup_offline.bat"
UTF8 = 65001
NOWHERE = "http://127.0.0.1:9/simple"  # the port "discard": nobody answers


@pytest.fixture
def full_index(index, archive, tools):
    """All wheels of the lock. The archive's building has fetched them."""
    for wheel in (tools / "wheels").glob("*.whl"):
        index.add(wheel)
    return index


QUICK = {"PIP_NO_COMPILE": "1"}  # byte code of ten thousand files takes minutes under wine


def settings(index_url: str, **more: str) -> dict[str, str]:
    return {**QUICK, "PIP_INDEX_URL": index_url, "PIP_RETRIES": "0", "PIP_TIMEOUT": "10", **more}


def remove(site, *packages: str) -> None:
    for package in packages:
        shutil.rmtree(site / package)
        (info,) = site.glob(f"{package}-*.dist-info")
        shutil.rmtree(info)


def test_damage_is_repaired_and_a_second_run_changes_nothing(bundle, full_index, port):
    (bundle.python / "python311._pth").unlink()
    remove(bundle.site, "pip", "waitress")
    (bundle.site / "flask" / "app.py").write_text("half")
    (bundle.site / "numpy" / "version.py").unlink()
    env = settings(full_index.url)

    first = bundle.run(SETUP, env=env)
    assert first.returncode == 0, first.stdout
    assert "python311._pth" in first.stdout and "一切就绪" in first.stdout and kept_window(first.stdout)
    assert "import" in (bundle.site / "flask" / "app.py").read_text() and (bundle.site / "numpy/version.py").is_file()

    before = _times(bundle)
    second = bundle.run(SETUP, env=settings(NOWHERE))
    assert second.returncode == 0 and "一切就绪" in second.stdout, second.stdout
    assert _times(bundle) == before
    with Running(bundle, "开启API服务.bat", "--port", str(port)) as server:
        *_, last = server.events("你好", answer_prefix="你")
        assert "演示模型" in last["response"]


def _times(bundle) -> dict[str, int]:
    """When each file of Python and its packages was written, but for byte code."""
    files = (path for path in bundle.python.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path): path.stat().st_mtime_ns for path in files if path.name != "installed.json"}


def test_wheels_of_the_bundle_need_no_network(bundle, tools):
    remove(bundle.site, "waitress")
    wheels = bundle.root / "system" / "wheels"
    wheels.mkdir()
    try:
        (wheel,) = (tools / "wheels").glob("waitress-*.whl")
        shutil.copy(wheel, wheels)
        done = bundle.run(SETUP, env=settings(NOWHERE))
        assert done.returncode == 0, done.stdout
        assert (bundle.site / "waitress" / "server.py").is_file()
    finally:
        shutil.rmtree(wheels)


def test_failure_says_why_and_the_next_run_goes_on(bundle, full_index):
    remove(bundle.site, "waitress")
    done = bundle.run(SETUP, env=settings(NOWHERE))
    assert done.returncode == 1 and kept_window(done.stdout)
    assert "安装没有成功" in done.stdout and "Traceback" not in done.stdout
    started = bundle.run("开启API服务.bat", "--model", "demo", "--port", "0", env=settings(NOWHERE))
    assert started.returncode == 1 and "安装没有成功" in started.stdout and kept_window(started.stdout)
    again = bundle.run(SETUP, env=settings(full_index.url))
    assert again.returncode == 0 and "接着装" in again.stdout, again.stdout


def test_package_that_somebody_deleted_is_named(bundle):
    kept = bundle.rig.lab / "kept"
    (bundle.site / "flask").rename(kept)
    try:
        done = bundle.run("start_small_vram.bat", "--model", "demo", "--port", "0")
    finally:
        kept.rename(bundle.site / "flask")
    assert done.returncode == 2 and kept_window(done.stdout)
    assert "flask" in done.stdout and "setup_offline.bat" in done.stdout and "Traceback" not in done.stdout


def test_library_that_a_virus_scanner_took_is_named(bundle):
    kept = bundle.rig.lab / "msvcp140.dll"
    (bundle.python / "msvcp140.dll").rename(kept)
    try:
        done = bundle.run("start_small_vram.bat", "--model", "demo", "--port", "0")
    finally:
        kept.rename(bundle.python / "msvcp140.dll")
    assert done.returncode == 2 and "setup_offline.bat" in done.stdout and "Traceback" not in done.stdout, done.stdout


def test_python_that_a_virus_scanner_broke(bundle):
    kept = bundle.rig.lab / "python311.dll"
    (bundle.python / "python311.dll").rename(kept)
    try:
        done = bundle.run("start_small_vram.bat", "--model", "demo", page=UTF8)
    finally:
        kept.rename(bundle.python / "python311.dll")
    assert done.returncode == 1 and kept_window(done.stdout) and "请先双击 setup_offline.bat" in done.stdout


def test_bundle_for_cuda_gets_pytorch_by_a_double_click(rig, cuda_archive, full_index, port):
    """First without a network, then with a driver that is too old, then with a better one."""
    bundle = unpack(rig, cuda_archive, "显卡")
    start, old = ("开启API服务.bat", "--model", "demo"), {"NVIDIA_SMI": "470.14, 8.6"}
    alone = bundle.run(*start, env={**settings(NOWHERE), **old, "PIP_RETRIES": "1"})
    assert alone.returncode == 1 and kept_window(alone.stdout) and "Traceback" not in alone.stdout
    assert "显卡驱动 470 太旧（PyTorch 要 525 或更新的）" in alone.stdout and "连不上软件源" in alone.stdout
    with Running(bundle, start[0], "--port", str(port), env={**settings(full_index.url), **old}) as server:
        assert "接着装" in server.text and "470 太旧" in server.text
        *_, last = server.events("你好", answer_prefix="你")
        assert "演示模型" in last["response"]

    # the build for CUDA is a tiny one here, of the right name
    gpu = settings(full_index.url, NVIDIA_SMI="551.23, 8.9", PYTORCH_INDEX_URL=f"{full_index.url}/cuda")
    there = bundle.run(SETUP, env=gpu)
    assert there.returncode == 0 and "原来的还在" in there.stdout, there.stdout
    assert bundle.ask_python("import importlib.metadata as m; print(m.version('torch'))") == "2.13.0"
    make_wheel(full_index.folder / "cuda" / "cu126" / "torch", "torch", "2.13.0+cu126", module="build = 'cu126'\n")
    done = bundle.run(SETUP, env=gpu)
    assert done.returncode == 0 and "cu126" in done.stdout, done.stdout
    assert bundle.ask_python("import torch; print(torch.build)") == "cu126"
    assert bundle.run(SETUP, env=settings(NOWHERE, NVIDIA_SMI="551.23, 8.9")).returncode == 0
    shutil.rmtree(bundle.root.parent)


# Without Python, where the .bat files themselves have something to say. wine's chcp changes nothing: the
# code page of these texts is that of the whole Windows
CURL = 'curl "$@"'
TAR = 'bsdtar "$@"'
CERTUTIL = 'echo "SHA256 hash of $2:"; sha256sum "$2" | cut -c1-64; echo "CertUtil: -hashfile command completed"'


@pytest.fixture
def windows_10(rig):
    """Three programs of Windows 10 that wine lacks; the first two are the same programs on Linux."""
    scripts = {"curl": CURL, "tar": TAR, "certutil": CERTUTIL}
    for name, script in scripts.items():
        rigs.compile_for_windows(rig.system32 / f"{name}.exe", rigs.HERE / "programs" / "unix.c")
        path = rig.system32 / f"{name}.sh"
        inside = f"/lab/{(rig.system32 / name).relative_to(rig.lab)}"
        path.write_text(f"#!/bin/sh\n{{ {script}; }} > {inside}.out\n"
                        f"echo $? > {inside}.new\nmv {inside}.new {inside}.rc\n")  # fmt: skip
        path.chmod(0o755)
    yield
    for name in scripts:
        for path in rig.system32.glob(f"{name}.*"):
            path.unlink()


@pytest.fixture
def checkout(rig, tools, full_index, tmp_path):
    """The project without Python. python.org's archive cannot be had here: another with the same files, of its hash."""
    from tools import bundle_files, bundle_python

    sha256 = embedded.SHA256.encode()
    root = rig.lab / "check out (1)"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    bundle_files.copy_project(root)
    files = bundle_python.unpack(bundle_python.obtain("copy", tools), tmp_path / "python")
    (full_index.folder / "3.11.9").mkdir()
    archive = full_index.folder / "3.11.9" / "python-3.11.9-embed-amd64.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    bat = root / SETUP
    text = bat.read_bytes().replace(b"https://www.python.org/ftp/python", full_index.url.encode())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest().encode()
    assert text.count(sha256) == 1
    bat.write_bytes(text.replace(sha256, digest))
    return Bundle(rig, root)


def test_checkout_without_python(checkout, windows_10, full_index, port):
    start = checkout.run("开启API服务.bat", "--model", "demo", page=UTF8)
    assert start.returncode == 1 and "请先双击 setup_offline.bat" in start.stdout and kept_window(start.stdout)

    (pip,) = full_index.flat.glob("pip-*.whl")
    make_pip_app(pip, full_index.folder / "pip.pyz")
    # no index is configured: pip comes by PyPA's own program, which here is told where to look
    env = {"BOOTSTRAP_PIP_URL": f"{full_index.url}/pip.pyz", "PIP_NO_INDEX": "1",
           "PIP_FIND_LINKS": f"{full_index.url}/flat/", **QUICK}  # fmt: skip
    done = checkout.run(SETUP, env=env, timeout=580)
    assert done.returncode == 0 and "一切就绪" in done.stdout, done.stdout
    assert (checkout.site / "pip" / "__main__.py").is_file()
    assert not checkout.root.joinpath("server/kernels/cpu/ready").exists()
    with Running(checkout, "开启API服务.bat", "--port", str(port)) as server:
        *_, last = server.events("你好", answer_prefix="你")
        assert "演示模型" in last["response"]
    shutil.rmtree(checkout.root)


def test_python_with_wrong_bytes_is_refused(checkout, windows_10, full_index):
    archive = full_index.folder / "3.11.9" / "python-3.11.9-embed-amd64.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    done = checkout.run(SETUP, env=settings(full_index.url), page=UTF8)
    assert done.returncode == 1 and kept_window(done.stdout)
    assert "请用浏览器下载" in done.stdout and "https://www.python.org/" in done.stdout
    assert not (checkout.python / "python.exe").exists() and not list(checkout.root.glob("system/*.zip*"))


def test_python_that_cannot_be_fetched(checkout, windows_10, full_index):
    (full_index.folder / "3.11.9" / "python-3.11.9-embed-amd64.zip").unlink()
    done = checkout.run(SETUP, env=settings(full_index.url), page=UTF8)
    assert done.returncode == 1 and "请用浏览器下载" in done.stdout and kept_window(done.stdout)


def test_the_bat_names_the_python_that_the_bundle_has():
    text = (ROOT / SETUP).read_text(encoding="ascii")
    assert embedded.SHA256 in text and embedded.ARCHIVE in text and embedded.VERSION in text
    assert embedded.URL.replace(embedded.ARCHIVE, "%ARCHIVE%") in text

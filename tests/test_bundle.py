"""The parts of tools/build_bundle.py, with tiny wheels; tests/windows builds and runs the real bundle."""

import json
import os
import re
import shutil
import zipfile

import pytest
from packaging.requirements import Requirement

from server.converted import kept, sha256
from system import embedded
from system.repair import forget_half_installed
from tests.conftest import ROOT
from tests.wheels import make_wheel
from tools import build_bundle, bundle_files, bundle_packages, bundle_python

LOCK = ROOT / "system" / "windows-lock.txt"
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))


def test_lock_is_what_requirements_ask_for():
    windows = {"sys_platform": "win32", "python_version": "3.11", "platform_system": "Windows"}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            wanted = Requirement(text)
            if not wanted.marker or wanted.marker.evaluate(windows):
                pin = PINS[wanted.name.lower().replace("_", "-")]
                assert wanted.specifier.contains(pin), f"{text}: run tools/lock_windows.py"
    assert {"pip", "msvc-runtime", "colorama"} <= PINS.keys()
    assert all(embedded.pinned(LOCK, name)[1] for name in PINS)


# wheels


@pytest.fixture
def wheels(tmp_path):
    """A package with a licence, a program, a DLL beside python.exe, and its lock."""
    folder = tmp_path / "wheels"
    make_wheel(folder, "one", "1", more={
        "one-1.dist-info/licenses/deep/LICENSE.txt": "do what you like",
        "one-1.dist-info/entry_points.txt": "[console_scripts]\none = one:main\n",
        "one-1.data/data/one.dll": "library",
        "one-1.data/data/Scripts/one.dll": "library",
        "one-1.data/scripts/tool.py": "#!python\n",
    }, metadata="License-Expression: MIT\n")  # fmt: skip
    return folder


def test_wheels_are_unpacked_as_pip_would_for_windows(wheels, tmp_path):
    python = tmp_path / "python"
    (package,) = bundle_packages.unpack(wheels.glob("*.whl"), python)
    files = {path.relative_to(python).as_posix() for path in python.rglob("*") if path.is_file()}
    info = "Lib/site-packages/one-1.dist-info/"
    assert files == {"one.dll", "Lib/site-packages/one.py", *(info + name for name in (
        "METADATA", "WHEEL", "RECORD", "INSTALLER", "entry_points.txt"))}  # fmt: skip
    assert (package.name, package.version, package.licence) == ("one", "1", "MIT")
    assert b"do what you like" in package.text
    assert "\n../../one.dll,sha256=" in "\n" + (python / info / "RECORD").read_text()
    forget_half_installed(python / "Lib" / "site-packages")
    assert (python / info).is_dir(), "setup takes it for whole"
    (python / "one.dll").unlink()
    forget_half_installed(python / "Lib" / "site-packages")
    assert not (python / info).exists(), "and sees what is missing"


def test_wheel_that_does_not_fit_its_record_is_refused(wheels, tmp_path):
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("smuggled.py", "")
    with pytest.raises(ValueError, match="smuggled"):
        bundle_packages.unpack([wheel], tmp_path / "python")


def test_wheels_are_known_by_their_hash(wheels, tmp_path, monkeypatch):
    (wheel,) = wheels.glob("*.whl")
    digest = sha256(wheel)
    lock = tmp_path / "lock.txt"
    lock.write_text(f"one==1 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{digest}\n")
    assert bundle_packages.fetch(lock, wheels) == [wheel]
    assert bundle_packages.fetch(lock, wheels, without=["one"]) == []
    lock.write_text(f"one==1 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", wheels.as_uri())
    with pytest.raises(SystemExit):
        bundle_packages.fetch(lock, tmp_path / "other")


# files and the zip


def fill(folder):
    (folder / "系统").mkdir(parents=True)
    (folder / "系统" / "启动.bat").write_bytes(b"@echo off\r\n")
    (folder / "b.safetensors").write_bytes(bytes(1000))
    (folder / "a.txt").write_text("a" * 1000)


def test_same_files_give_the_same_zip(tmp_path):
    for name, when in (("one", 1_600_000_000), ("two", 1_700_000_000)):
        fill(tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            os.utime(path, (when, when))
            path.chmod(0o700 if name == "one" else 0o755)
        bundle_files.write_manifest(tmp_path / name, {"build": "cpu"})
        bundle_files.write_zip(tmp_path / name, tmp_path / f"{name}.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as made:
        assert made.testzip() is None
        assert made.namelist() == [f"chatglm-portable/{name}" for name in (
            "a.txt", "b.safetensors", "manifest.json", "系统/启动.bat")]  # fmt: skip
        kinds = {item.filename.rpartition("/")[2]: item.compress_type for item in made.infolist()}
        manifest = json.loads(made.read("chatglm-portable/manifest.json"))
    assert kinds["b.safetensors"] == zipfile.ZIP_STORED and kinds["a.txt"] == zipfile.ZIP_DEFLATED
    assert manifest["build"] == "cpu" and manifest["longest_path"] == len("b.safetensors")
    assert manifest["files"]["a.txt"] == sha256(tmp_path / "one" / "a.txt")


def test_project_without_tests_and_with_line_ends_of_windows(tmp_path):
    bundle_files.copy_project(tmp_path)
    assert (tmp_path / "server" / "serve.py").is_file() and (tmp_path / "THUDM" / "demo" / "config.json").is_file()
    assert not (tmp_path / "tests").exists() and not (tmp_path / "tools").exists()
    bats = list(tmp_path.rglob("*.bat"))
    assert len(bats) >= 6 and all(path.read_bytes().endswith(b"\r\n") for path in bats)


@pytest.fixture
def model(tmp_path):
    """A copy of the demo model with a licence, and what downloads, caches and git leave beside it."""
    folder = tmp_path / "chatglm2-6b"
    shutil.copytree(ROOT / "THUDM" / "demo", folder)
    for name in ("MODEL_LICENSE", "quantized/cpu-int4.safetensors", ".git/config", "pytorch_model.bin.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["chatglm2-6b", "我的'模型'"])
def test_model_inside(tmp_path, model, name):
    source = model.rename(tmp_path / name)
    bundle_files.check_model(source)
    bundle_files.copy_model(source, tmp_path / "bundle")
    assert files_in(tmp_path / "bundle" / "THUDM" / name) == {
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "README.md", "MODEL_LICENSE"
    }  # fmt: skip
    bundle_files.write_licences(tmp_path / "bundle", [], {}, source)
    table = (tmp_path / "bundle" / "licences" / "README.md").read_text(encoding="utf-8")
    assert f"(<../THUDM/{name}/MODEL_LICENSE>)" in table
    config = tmp_path / "bundle" / "config.toml"
    assert config.exists() == (name != "chatglm2-6b")
    if config.exists():
        from server.config import parse

        assert parse([], env={}, root=tmp_path / "bundle").model == name


def test_pickles_that_were_converted_stay_out(tmp_path, model):
    """The first start would hash them all, and nothing reads them."""
    import torch
    from safetensors.torch import load_file

    from server.models.convert import convert

    weights = model / "model.safetensors"
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    bundle_files.copy_model(model, tmp_path / "pickles")
    assert "pytorch_model.bin" in files_in(tmp_path / "pickles" / "THUDM" / model.name)
    convert(model, [model / "pytorch_model.bin"])
    bundle_files.copy_model(model, tmp_path / "bundle")
    inside = files_in(tmp_path / "bundle" / "THUDM" / model.name)
    assert "model.safetensors" in inside and "pytorch_model.bin" not in inside


@pytest.mark.parametrize("lacking", ["tokenizer.model", "model.safetensors", "MODEL_LICENSE"])
def test_incomplete_model_is_refused(model, lacking):
    (model / lacking).unlink()
    with pytest.raises(SystemExit, match=lacking):
        bundle_files.check_model(model)


def test_model_of_which_only_the_quantized_file_was_kept_is_refused(model):
    """It runs on the CPU alone, and the launchers are for GPUs."""
    (model / "model.safetensors").unlink()
    header = {"__metadata__": {"version": '"1"', "sources": '[{"name": "model.safetensors"}]', "sums": '{"a": ""}'},
              "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}  # fmt: skip
    text = json.dumps(header).encode()
    (model / "quantized" / "cpu-int4.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    assert kept(model)
    with pytest.raises(SystemExit, match=r"lacks model\.safetensors"):
        bundle_files.check_model(model)


def test_python_with_wrong_bytes_is_refused(tmp_path):
    (tmp_path / "python.zip").write_bytes(b"not Python")
    for source in (str(tmp_path / "python.zip"), (tmp_path / "python.zip").as_uri()):
        with pytest.raises(SystemExit, match=embedded.SHA256):
            bundle_python.obtain(source, tmp_path)
    for source in (str(tmp_path / "none.zip"), "http://127.0.0.1:9/python.zip"):
        with pytest.raises(SystemExit, match=r"is not there|cannot be fetched"):
            bundle_python.obtain(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["python.zip"]


def test_torch_wheel_of_another_build_is_refused(tmp_path):
    make_wheel(tmp_path, "torch", "2.0+cu126")
    with pytest.raises(SystemExit):
        build_bundle._options(["--build", "cu130", "--torch", str(next(tmp_path.glob("*.whl")))])
    with pytest.raises(SystemExit):
        build_bundle._options(["--torch", "x.whl"])

"""Model folders, whole and broken in the ways that users' are."""

import hashlib
import json
import shutil
import zipfile

import pytest

from server.config import Config
from server.doctor import model as model_module
from server.doctor.checks import all_checks
from server.doctor.machine import Machine, Model
from server.doctor.model import check_model_files, compare, damage
from server.doctor.result import Check, State
from server.doctor.running import run_all
from server.download.folder import missing_files
from server.profiles import Note
from tests.conftest import ROOT

DEMO = ROOT / "THUDM" / "demo"


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo model, in a folder of the user's own."""
    return shutil.copytree(DEMO, tmp_path / "我的模型")


def check(folder, root=ROOT, published=None, size=None, **options):
    config = Config(model=str(folder), **options)
    return check_model_files(Model(folder, missing_files(folder)), config, root, size, published or {})


def test_a_whole_model(folder):
    result = check(folder)
    assert result.state is State.OK and "ChatGLM2" in result.finding.en and "complete" in result.finding.en
    assert result.facts["files"]["model.safetensors"] == (DEMO / "model.safetensors").stat().st_size
    assert result.facts["family"] == "chatglm2" and not result.facts["damaged"] and not result.facts["missing"]


def test_a_model_that_was_cut_off(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = check(folder)
    size = (DEMO / "model.safetensors").stat().st_size
    assert result.state is State.PROBLEM and f"{size - 1000} bytes instead of {size}" in result.finding.zh
    assert result.facts["damaged"].keys() == {"model.safetensors"} and "complete" not in result.finding.en


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.safetensors", b"<!DOCTYPE html><html>" * 100, "no safetensors file"),
        ("model.safetensors", b"", "no safetensors file"),
        ("model.safetensors", (2**40).to_bytes(8, "little") + b"{}" * 99, "no safetensors file"),
        ("model.safetensors", (9).to_bytes(8, "little") + b'{"a": "b"' * 99, "not valid JSON"),
        ("pytorch_model-00001-of-00007.bin", b"<html>", "no PyTorch file"),
        ("pytorch_model.bin", b"PK\x03\x04" + b"x" * 5000, "cut off"),
        ("pytorch_model.bin", b"\x80\x02pickle", ""),
        ("config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[" * 200_000, "not valid JSON"),
        ("tokenizer.model", b"", "empty"),
        ("tokenizer.model", b"x", ""),
    ],
)
def test_damage(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    assert damage(tmp_path / name) == why


@pytest.mark.parametrize("content", ["5", "[1]", '{"a": 5}', '{"a": {"data_offsets": "x"}}'])
def test_headers_of_no_sense(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(len(content).to_bytes(8, "little") + content.encode() + b"x" * 9)
    assert damage(tmp_path / "a.safetensors")


def test_a_pickle_that_is_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"x" * 1000)
    assert damage(tmp_path / "pytorch_model.bin") == ""
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:-50])
    assert damage(tmp_path / "pytorch_model.bin") == "cut off"


def test_files_of_a_users_folder_that_are_not_there(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (folder / "tokenizer.model").unlink()
    result = check(folder)
    assert result.state is State.PROBLEM and "Git LFS" in result.finding.en and "tokenizer.model" in result.finding.zh


def test_a_published_model_is_downloaded(tmp_path):
    folder = tmp_path / "THUDM" / "chatglm2-6b"
    result = check(folder, root=tmp_path, size=12_500_000_000)
    assert result.state is State.WARNING and "not downloaded yet" in result.finding.en
    assert "about 12.5 GB" in result.advice.en and "约 12.5 GB" in result.advice.zh
    shutil.copytree(DEMO, folder)
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors" in check(folder, root=tmp_path).finding.en


def published(folder):
    return {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.suffix in (".model", ".safetensors")
    }


def test_sums_of_published_files(folder):
    known = published(folder)
    result = check(folder, published=known)
    assert result.state is State.OK and "SHA-256 compared for 2 of 2" in result.finding.en
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = check(folder, published=known)
    assert result.state is State.WARNING and "not as published: model.safetensors" in result.finding.en
    assert result.facts["hashed"] == {"tokenizer.model": True, "model.safetensors": False}


def test_sizes_of_published_files(folder):
    known = {**published(folder), "tokenizer.model": (1, "0" * 64)}
    result = check(folder, published=known)
    assert result.state is State.PROBLEM and "bytes instead of 1" in result.finding.en
    known["tokenizer.model"] = (None, known["model.safetensors"][1])
    assert check(folder, published=known).facts["hashed"]["tokenizer.model"] is False


def test_hashing_ends_when_its_time_is_over(folder):
    wrong, hashed = compare(folder, published(folder), seconds=-1)
    assert not wrong and not hashed


def test_what_is_no_model_is_the_same_sentence_as_at_the_start(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "glm4"}))
    (outcome,) = [o for o in run_all(all_checks(Machine(Config(model=str(folder))), None)) if o.check.id == "model"]
    assert outcome.result.state is State.PROBLEM and "none of the supported models" in outcome.result.finding.en


def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch):
    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(folder), "open", refuse)
    (outcome,) = run_all([Check("model", Note("", ""), lambda: check(folder))])
    assert outcome.result.state is State.PROBLEM and "delete" not in str(outcome.result.advice)
    assert "cannot be read (Permission denied)" in outcome.result.finding.en


def test_what_is_there_of_a_download_is_not_downloaded_again(tmp_path):
    folder = tmp_path / "THUDM" / "chatglm2-6b-int4"
    folder.mkdir(parents=True)
    with (folder / "pytorch_model.bin.part").open("wb") as part:
        part.truncate(3_000_000_000)
    checks = all_checks(Machine(Config("chatglm2-6b-int4"), root=tmp_path), None)
    disk, model = (o.result for o in run_all([check for check in checks if check.id in ("model", "disk")]))
    assert disk.facts["model"] == pytest.approx(3_923_712_365 - 3_000_000_000, rel=0.01)
    assert "about 0.9 GB" in model.advice.en


def test_a_generation_that_is_guessed(folder, monkeypatch):
    told = model_module.Told("chatglm2", guessed=True)
    monkeypatch.setattr(model_module, "tell_folder", lambda folder: told)
    result = check(folder)
    assert result.state is State.WARNING and "--family" in result.advice.en
    assert check(folder, family="chatglm3").state is State.OK

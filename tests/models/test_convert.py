"""Pickles as one safetensors file: the same tensors, made once, whole or not at all, and never in the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from server import converted, converting
from server.converted import NoRoom, has_right_sums, read, whole_file
from server.converting import NotConvertible, Sources
from server.errors import ModelError
from server.file_lock import folder_lock
from server.models import checkpoint, convert, loader
from server.models.checkpoint import weight_files
from tests.conftest import ROOT
from tests.models.test_loader import CONFIG, WEIGHTS, load, save, write_bin, write_bin_index, write_bin_shards
from tests.models.test_loader import write_legacy_bin as write_legacy

LAYOUTS = [write_bin, write_bin_index, write_bin_shards, write_legacy]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "模型 一"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


@pytest.fixture
def any_size(monkeypatch):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    monkeypatch.setattr(convert, "UNASKED_SPARE_BYTES", 0)


@pytest.fixture
def no_pickles(monkeypatch):
    """Called to forbid reading them from then on."""

    def forbid():
        monkeypatch.setattr(checkpoint, "_load_torch", lambda path: pytest.fail(f"read {path}"))

    return forbid


def state(folder):
    return load(folder)[0].state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name


@pytest.mark.parametrize("write", LAYOUTS)
def test_later_starts_read_no_pickle(folder, write, any_size, no_pickles):
    write(folder)
    first = state(folder)
    assert_same(load_file(whole_file(folder)), WEIGHTS)
    assert not (folder / ".converting").exists()
    no_pickles()
    assert_same(state(folder), first)


def test_what_the_file_says_of_itself(folder):
    write_bin_shards(folder)
    files = weight_files(folder)
    file = read(convert.convert(folder, files))
    assert file.originals == files and has_right_sums(file)
    with safe_open(file.path, "pt") as opened:
        assert opened.metadata()["format"] == "pt", "transformers refuses others"
    for path in files:
        source = file.sources[path.name]
        assert (source["size"], source["sha256"]) == (path.stat().st_size, converted.sha256(path))


def test_small_models_and_safetensors_are_left_as_they_are(folder):
    write_bin(folder)
    load(folder)
    assert not whole_file(folder).exists()
    save(WEIGHTS, whole_file(folder))
    assert convert.convert_once(folder, [whole_file(folder)], 0) == [whole_file(folder)]
    assert read(whole_file(folder)) is None


def test_other_pickles_are_converted_again(folder, any_size):
    write_bin(folder)
    state(folder)
    changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    save(changed, folder / "pytorch_model.bin")
    assert_same(state(folder), {name: tensor.float() for name, tensor in changed.items()})
    assert_same(load_file(whole_file(folder)), changed)
    (folder / "pytorch_model.bin").unlink()
    write_bin_shards(folder)  # other files altogether
    assert_same(state(folder), {name: tensor.float() for name, tensor in WEIGHTS.items()})


def test_a_copied_folder_is_not_converted_again_and_hashed_once(folder, any_size, no_pickles, tmp_path, monkeypatch):
    write_bin_index(folder)
    first = state(folder)
    other = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    no_pickles()
    assert_same(state(other), first)
    with monkeypatch.context() as forbidding:
        forbidding.setattr(converted, "sha256", lambda path: pytest.fail(f"hashed {path} again"))
        assert_same(state(other), first)
    pickle = next(other.glob("*.bin"))
    changed = bytearray(pickle.read_bytes())
    changed[-1] ^= 1
    pickle.write_bytes(changed)
    assert converted.is_outdated(other), "the note is of another file"


def test_what_safetensors_cannot_hold_is_read_as_it_is(folder, any_size, caplog):
    save({**WEIGHTS, "x": torch.zeros(2, dtype=torch.complex64)}, folder / "pytorch_model.bin")
    assert state(folder).keys() == WEIGHTS.keys()
    assert "not converted" in caplog.text and not whole_file(folder).exists()


def test_a_file_that_changes_while_it_is_converted_is_another_one(folder):
    write_bin(folder)
    (path,) = weight_files(folder)
    with Sources([path]) as sources:
        os.utime(path)
        converting.write(whole_file(folder), WEIGHTS.items(), 0, sources)
    (made,) = read(whole_file(folder)).sources.values()
    assert made["mtime_ns"] != path.stat().st_mtime_ns


def test_views_and_shared_tensors(folder):
    table = torch.arange(24.0).view(4, 6)
    tensors = {"a": table, "b": table, "turned": table.t(), "one": table[2, 3], "none": torch.zeros(0, 3)}
    save(tensors, folder / "pytorch_model.bin")
    path = convert.convert(folder, [folder / "pytorch_model.bin"])
    assert_same(load_file(path), {name: tensor.contiguous() for name, tensor in tensors.items()})
    assert has_right_sums(read(path))


def test_a_tensor_that_is_there_twice(folder):
    for number in (1, 2):
        save(WEIGHTS, folder / f"pytorch_model-0000{number}-of-00002.bin")
    with pytest.raises(NotConvertible, match="twice"):
        convert.convert(folder, weight_files(folder))
    assert not whole_file(folder).exists() and not (folder / ".converting").exists()


def test_a_damaged_pickle_is_named(folder, any_size):
    write_bin_shards(folder)
    second = weight_files(folder)[1]
    second.write_bytes(second.read_bytes()[:-200])
    with pytest.raises(ModelError, match=second.name):
        state(folder)
    assert not whole_file(folder).exists()


def filled(folder):
    """8 MB of weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save({**WEIGHTS, **{f"{i}": torch.full((250_000,), float(i)) for i in range(8)}}, folder / "pytorch_model.bin")
    return folder


def test_too_little_room_is_said_and_does_no_harm(small_disk, any_size, caplog):
    caplog.set_level("INFO")
    assert state(filled(small_disk)).keys() == WEIGHTS.keys()
    assert "磁盘要有" in caplog.text and "every start reads the pickles" in caplog.text
    assert not whole_file(small_disk).exists()


def test_a_start_leaves_more_of_the_disk_free_than_who_asks_for_the_file(folder, any_size, monkeypatch):
    monkeypatch.setattr(convert, "UNASKED_SPARE_BYTES", 10**15)
    write_bin(folder)
    state(folder)
    assert not whole_file(folder).exists()
    assert convert.convert(folder, weight_files(folder)).exists()


def test_a_disk_that_fills_up_while_it_is_written(small_disk, any_size, monkeypatch, caplog):
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage._replace(free=10**12))  # others write too
    caplog.set_level("INFO")
    assert state(filled(small_disk)).keys() == WEIGHTS.keys()
    assert "every start reads the pickles" in caplog.text
    assert {file.name for file in small_disk.glob("*.*")} == {"config.json", "pytorch_model.bin", ".download"}
    with pytest.raises(NoRoom):
        convert.convert(small_disk, weight_files(small_disk))


def test_a_folder_that_cannot_be_written_is_used_all_the_same(small_disk, any_size, monkeypatch, caplog):
    filled(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert state(small_disk).keys() == WEIGHTS.keys()
    assert "照样能用" in caplog.text and "all works" in caplog.text and os.strerror(errno.EROFS) in caplog.text


def test_what_a_killed_program_left_takes_no_room(small_disk):
    save({"a": torch.ones(10**6)}, small_disk / "pytorch_model.bin")
    (small_disk / ".converting").write_bytes(bytes(6 * 10**6))
    convert.convert(small_disk, weight_files(small_disk), spare=0)
    assert not (small_disk / ".converting").exists() and has_right_sums(read(whole_file(small_disk)))


def test_who_gives_up_does_not_go_on_hashing(tmp_path):
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(2**35)  # nothing of it is on the disk, and hashing it takes half a minute
    hashing = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Sources([tmp_path / "endless"] * 2):
        assert threading.active_count() > hashing
        raise KeyboardInterrupt
    deadline = time.monotonic() + 5
    while threading.active_count() > hashing:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_program_that_writes_is_not_disturbed(folder, any_size, caplog):
    caplog.set_level("INFO")
    write_bin(folder)
    with folder_lock(folder):
        assert state(folder).keys() == WEIGHTS.keys()
    assert "另一个程序" in caplog.text and "Another program" in caplog.text and not whole_file(folder).exists()


def test_what_is_cut_off_or_strange_is_not_ours(folder):
    write_bin(folder)
    path = convert.convert(folder, weight_files(folder))
    content = path.read_bytes()
    for wrong in (content[:-1], content[:100], b"", b"\xff" * 5000, content.replace(b'"version"', b'"Version"')):
        path.write_bytes(wrong)
        assert read(path) is None
    save(WEIGHTS, path)
    assert read(path) is None


def test_every_damaged_bit_of_a_tensor_is_found(folder):
    write_bin(folder)
    path = convert.convert(folder, weight_files(folder))
    for place in (2**20, path.stat().st_size - 1):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert not has_right_sums(read(path))
        content[place] ^= 1
        path.write_bytes(content)
    assert has_right_sums(read(path))


MEASURE = """
import resource, sys, torch
from pathlib import Path
from server.models.checkpoint import weight_files
from server.models.convert import convert
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(folder, weight_files(folder))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(os.name == "nt", reason="no getrusage")
def test_peak_memory_is_a_shard_at_most(tmp_path):
    for number in range(1, 5):
        tensors = {f"{number}.{i}": torch.ones(2_500_000) for i in range(4)}  # 40 MB
        torch.save(tensors, tmp_path / f"pytorch_model-0000{number}-of-00004.bin")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    measured = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(measured.stdout) < 75e6
    assert whole_file(tmp_path).stat().st_size > 160e6

"""``download --prune`` in real processes: what is deleted, when nothing is, and what starts afterwards."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from server import prune as module
from server.config import Config
from server.converted import kept, quantized_file, whole_file
from server.download import ensure_edition
from server.download.folder import missing_files
from server.errors import ModelError, StartupError
from server.file_lock import folder_lock
from server.kernels.cpu_ops import CpuOps
from server.kernels.torch_ops import TorchOps
from server.models import loader
from server.models.checkpoint import weight_files
from server.models.convert import convert
from tests.conftest import ROOT
from tests.models.reference import OWN
from tests.pruning import (
    DEMO,
    EVERY,
    RENAMED,
    answer,
    load_logits,
    needs_compiler,
    pickled_demo,
    pickles,
    prune,
    without_hub,
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    return without_hub(tmp_path, monkeypatch)


@pytest.fixture
def mine(root):
    return pickled_demo(root / "我的 模型")


def test_a_start_reads_the_converted_file_alone_and_answers_the_same(root, mine, capsys):
    before = answer(mine)
    size = sum((mine / name).stat().st_size for name in pickles(mine))
    code, out, err = prune(root, str(mine))
    assert code == 0, err
    assert f"Deleted 3 original files of weights, {size / 1e6:.1f} MB were freed" in out
    assert not pickles(mine) and whole_file(mine).is_file() and not missing_files(mine)
    assert answer(mine) == before
    assert module.prune(Config(model=str(mine), language="en"), root) == 0
    assert "nothing to delete" in capsys.readouterr().out


@needs_compiler
def test_what_the_cpu_needs_is_kept_quantized(root, mine, capsys):
    before = answer(mine, "-q", "4")
    code, out, err = prune(root, str(mine), "-q", "4", "--device", "cpu")
    assert code == 0 and "quantized/cpu-int4.safetensors" in out, err
    assert not pickles(mine) and not whole_file(mine).exists() and not missing_files(mine)
    assert answer(mine) == before  # nothing was asked for: what is there is used
    for options in (("-q", "8"), ("-q", "16")):
        config = Config(model=str(mine), quantize=int(options[1]), device="cpu", language="en")
        with pytest.raises(ModelError, match="runs only on the CPU with -q 4"):
            ensure_edition(config, root)


@needs_compiler
def test_what_the_quantized_file_was_made_of_goes_with_its_own_originals(root, mine, monkeypatch):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    convert(mine, weight_files(mine))  # a start on a GPU
    assert module.prune(Config(model=str(mine), quantize=4, device="cpu", language="en"), root) == 0
    assert not pickles(mine) and not whole_file(mine).exists() and kept(mine).keys() == {4}


@needs_compiler
def test_for_a_lora_the_weights_stay_as_they_are(root, mine, monkeypatch):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    config = Config(model=str(mine), quantize=4, device="cpu", lora=OWN / "small-chatglm2-lora", language="en")
    assert module.prune(config, root) == 0
    assert not pickles(mine) and whole_file(mine).exists() and not kept(mine)
    ensure_edition(config, root)  # nothing is missing


@needs_compiler
def test_after_the_last_kept_file_is_damaged_the_user_is_told_what_to_do(root, mine):
    assert prune(root, str(mine), "-q", "4", "--device", "cpu")[0] == 0
    path = quantized_file(mine, 4)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    command = [sys.executable, "-m", "server", "chat", "--model", str(mine), "-q", "4", "--language", "en"]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "delete this file and start again" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("bits", [16, pytest.param(4, marks=needs_compiler)])
def test_killed_at_any_moment_it_leaves_a_model_that_starts(root, bits, monkeypatch):
    """After each step: the tensors are written, the header, all is synced, renamed, checked, each original deleted."""
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    options, ops = ("-q", str(bits), "--device", "cpu"), TorchOps() if bits == 16 else CpuOps(1)
    before = load_logits(pickled_demo(root / "as it was"), bits, ops)
    pickled_demo(root / "0" / "THUDM" / "mine")
    shutil.copy(root / "manifest.json", root / "0")
    code, _, err = prune(root, "mine", *options, kill_at=EVERY)
    assert code == 0, err
    *killed, whole = sorted((path for path in root.iterdir() if path.name.isdigit() and path.name != "0"),
                            key=lambda path: int(path.name))  # fmt: skip
    assert len(killed) == 11 and not pickles(whole / "THUDM" / "mine")
    left = set()
    for place in killed:
        folder = place / "THUDM" / "mine"
        left.add(len(pickles(folder)))
        assert not missing_files(folder) and torch.equal(load_logits(folder, bits, ops), before), place.name
        assert module.prune(Config(model="mine", quantize=bits, device="cpu", language="en"), place) == 0
        assert not pickles(folder) and not [*folder.rglob(".converting")]
        assert torch.equal(load_logits(folder, bits, ops), before)
    assert left == {0, 1, 2, 3}


# when nothing may be deleted


def refused(root, *argv):
    code, _, err = prune(root, *argv)
    assert code == 2 and err.count("\n") == 1, err
    return err


def test_a_link_out_of_the_programs_folder_is_not_followed_unless_written(root, mine):
    (root / "THUDM").mkdir()
    (root / "THUDM" / "linked").symlink_to(mine)
    assert f"nothing was deleted: if that is what you want, write --model {mine}" in refused(root, "linked")
    assert len(pickles(mine)) == 3
    assert prune(root, str(mine))[0] == 0 and not pickles(mine)


def test_links_to_files_elsewhere_are_left(root, mine):
    blob = root / "blob"
    (mine / pickles(mine)[0]).rename(blob)
    (mine / "pytorch_model-00001-of-00003.bin").symlink_to(blob)
    assert "only a link" in refused(root, str(mine)) and len(pickles(mine)) == 3 and blob.exists()


def test_ctrl_c_deletes_nothing_and_says_so(root, mine, monkeypatch):
    monkeypatch.setenv("interrupt", "1")
    code, _, err = prune(root, str(mine), kill_at=RENAMED - 2)
    assert code == 130 and "nothing was deleted" in err and err.count("\n") == 1
    assert len(pickles(mine)) == 3 and not whole_file(mine).exists() and not (mine / ".converting").exists()


def test_another_program_in_the_folder_is_waited_for(root, mine):
    with folder_lock(mine):
        assert "try again when it is done" in refused(root, str(mine)) and len(pickles(mine)) == 3


@pytest.mark.parametrize("options", [(), pytest.param(("-q", "4", "--device", "cpu"), marks=needs_compiler)], ids=str)
def test_a_full_disk_deletes_nothing(root, small_disk, options):
    folder = pickled_demo(small_disk / "mine")
    err = refused(root, str(folder), *options)
    assert "is full" in err and "are needed" in err and len(pickles(folder)) == 3


def test_a_damaged_original_is_not_deleted(root, mine):
    path = mine / pickles(mine)[1]
    path.write_bytes(path.read_bytes()[:-300])
    assert path.name in refused(root, str(mine)) and len(pickles(mine)) == 3


def test_an_original_that_is_exchanged_after_the_conversion_is_not_deleted(root, mine, monkeypatch):
    really, path = module._convert, mine / pickles(mine)[1]

    def converted(*args):
        file = really(*args)
        path.write_bytes(path.read_bytes()[::-1])  # by a program that knows nothing of our lock
        return file

    monkeypatch.setattr(module, "_convert", converted)
    with pytest.raises(StartupError, match="was changed since it was converted"):
        module.prune(Config(model=str(mine), language="en"), root)
    assert len(pickles(mine)) == 3


def test_a_damaged_result_is_noticed(root, mine):
    prune(root, str(mine), kill_at=RENAMED)  # it is there, all originals too
    assert len(pickles(mine)) == 3 and whole_file(mine).exists()
    content = bytearray(whole_file(mine).read_bytes())
    content[-1] ^= 1
    whole_file(mine).write_bytes(content)
    assert "is damaged" in refused(root, str(mine)) and len(pickles(mine)) == 3


def test_what_cannot_be_pruned(root):
    assert "leave --prune out" in refused(root, "text2vec-large-chinese")
    assert "leave --prune out" in refused(root, "chatglm2-6b", "--verify")
    folder = root / "THUDM" / "demo"
    shutil.copytree(DEMO, folder)
    code, out, _ = prune(root, "demo")
    assert code == 0 and "there is nothing to delete" in out and (folder / "model.safetensors").is_file()

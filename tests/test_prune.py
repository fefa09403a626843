"""``download --prune`` in real processes: what is deleted, when nothing is, and what starts afterwards."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from server import prune as module
from server.config import Config
from server.converted import kept, quantized_file, whole_file
from server.doctor.machine import Machine, Model
from server.doctor.model import check_model_files
from server.doctor.result import State
from server.download import ensure_edition
from server.download.folder import missing_files
from server.download.pruned import choose_for, wants_originals
from server.engine.kv_cache import KVCache
from server.errors import ModelError, StartupError
from server.file_lock import folder_lock
from server.footprint import ModelShape
from server.hardware import Hardware
from server.kernels.build import available
from server.kernels.cpu_ops import CpuOps
from server.kernels.torch_ops import TorchOps
from server.models import loader
from server.models.base import ForwardBatch, Segment
from server.models.checkpoint import weight_files
from server.models.convert import convert
from server.models.loader import load_model
from server.profiles import choose
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.models.reference import OWN

DEMO = ROOT / "THUDM" / "demo"
NAME = "chatglm2-6b"
NOWHERE = "http://127.0.0.1:9"
RENAMED = 5  # what was left of a killed run removed, tensors, header, fsync, rename
EVERY = -1  # one process after the other is killed, each a step later, until one comes to its end
SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
from server import __main__, prune
from server.download import command, manifest
really, other, steps = prune.prune, command.download, 0

def deadly(function):  # the kill_at-th call, of all that matter to the disk, is the last thing that is done
    def step(*args, **keywords):
        global steps
        result = function(*args, **keywords)
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGINT if "interrupt" in os.environ else signal.SIGKILL)
        return result
    return step

def run(root, argv):
    manifest.MANIFEST = root / "manifest.json"
    command.download = lambda config: other(config, root)
    if "--prune" in argv:
        prepare(root)
    return __main__._run(["download", "--language", "en", *argv])

def prepare(root):
    from server import converting
    from server.models import loader
    loader.CACHED_FROM = 0
    prune.prune = lambda config: really(config, root)
    for owner, name in ((converting.Sources, "described"), (converting, "_write_all"), (os, "fsync"), (os, "replace"),
                        (Path, "unlink"), (prune, "has_right_sums")):
        setattr(owner, name, deadly(getattr(owner, name)))

home, kill_at, argv = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if kill_at >= 0:
    sys.exit(run(home, argv))
import torch, server.adapters, server.download.fetch, server.models.loader  # once, and not in each of the processes
kill_at = code = 0
while not kill_at or code == -signal.SIGKILL:
    kill_at += 1
    root = shutil.copytree(home / "0", home / str(kill_at))
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        os._exit(run(root, argv))
sys.exit(code)
"""
needs_compiler = pytest.mark.skipif(not available(), reason="no C compiler for the CPU kernels")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Of a program that knows no model and no hub."""
    for variable in os.environ:
        if variable.startswith(("HF_", "CHATGLM_")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr("server.download.manifest.MANIFEST", tmp_path / "manifest.json")
    return tmp_path


def pickled_demo(folder):
    """The demo model as chatglm2-6b is published: pickles in shards, with an index."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    tensors = load_file(DEMO / "model.safetensors")
    places = {}
    for number in (1, 2, 3):
        shard = f"pytorch_model-0000{number}-of-00003.bin"
        part = {name: tensors[name].clone() for name in sorted(tensors)[number - 1 :: 3]}
        torch.save(part, folder / shard)
        places |= dict.fromkeys(part, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def pickles(folder):
    return sorted(path.name for path in folder.glob("pytorch_model-*.bin"))


def prune(root, *argv, kill_at=0):
    return run(root, "--prune", *argv, kill_at=kill_at)


def run(root, *argv, kill_at=0):
    """The command download."""
    command = [sys.executable, "-c", SCRIPT, str(root), str(kill_at), *argv]
    env = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def answer(folder, *options):
    """Of the real program, greedy: its whole output."""
    command = [sys.executable, "-m", "server", "chat", "--model", str(folder), "--temperature", "0", *options]
    env = {**os.environ, "PYTHONUTF8": "1", "CHATGLM_LANG": "en"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, input="hello\n", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
@pytest.mark.parametrize("kernels", [True, False])
def test_who_asks_for_nothing_gets_what_was_kept_and_who_asks_does_not(root, mine, monkeypatch, kernels):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)
    assert module.prune(Config(model=str(mine), quantize=4, device="cpu", language="en"), root) == 0
    here = Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=kernels)
    shape = ModelShape.from_folder(mine)
    chosen = choose_for(mine, here, shape, Config(model=str(mine)))
    if kernels:
        assert (chosen.bits, chosen.kernels) == (4, True)
    else:
        assert chosen == choose(here, shape, Config(model=str(mine)))
    lora = {"quantize": 4, "lora": OWN / "small-chatglm2-lora"}
    for asked in ({"quantize": 16}, {"profile": "large"}, {"dtype": "bfloat16"}, lora):
        config = Config(model=str(mine), device="cpu", **asked)
        chosen = choose_for(mine, here, shape, config)
        assert chosen == choose(here, shape, config)
        assert wants_originals(mine, here, config), asked


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


def load_logits(folder, bits, ops):
    model = load_model(folder, dtype=torch.float32, device="cpu", bits=bits, ops=ops)
    kv = KVCache(model.network.kv_shape, 1, 64, model.kv_dtype, "cpu", model.prefix)
    with torch.inference_mode():
        return model.network.forward(ForwardBatch(torch.arange(3, 23), [Segment(0, 0, 20)], torch.arange(20)), kv)


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


@needs_compiler
def test_other_weights_in_the_folder_count_and_not_what_was_kept(root, mine):
    assert prune(root, str(mine), "-q", "4", "--device", "cpu")[0] == 0 and kept(mine)
    shutil.copy(DEMO / "model.safetensors", mine)  # that the kept file was not made of
    assert not kept(mine)


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


# what else has to know


@pytest.fixture
def published(root):
    """The folder of a published model, and a hub that has it."""
    folder = pickled_demo(root / "THUDM" / NAME)
    with Hub({f"THUDM/{NAME}": {path.name: path.read_bytes() for path in folder.iterdir()}}) as hub:
        yield folder, hub


def download(root, *argv):
    code, out, _ = run(root, *argv)
    return code, out


@pytest.mark.parametrize("options", [(), pytest.param(("-q", "4", "--device", "cpu"), marks=needs_compiler)], ids=str)
def test_pruned_originals_are_not_missing(root, published, options):
    folder, hub = published
    code, _, err = prune(root, NAME, *options, "--source", hub.url)
    assert code == 0 and not pickles(folder), err
    assert download(root, NAME, *options, "--source", hub.url)[0] == 0
    assert not pickles(folder) and not hub.fetched()
    code, out = download(root, NAME, "--verify", "--source", NOWHERE)
    name = "quantized/cpu-int4.safetensors" if options else "model.safetensors"
    assert code == 0 and f"  {name}  ok" in out and "pytorch_model" not in out.replace(".bin.index.json", "")
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out = download(root, NAME, "--verify", "--source", NOWHERE)
    assert code == 1 and f"  {name}  broken" in out and f"{path} was made here: delete it" in out


@needs_compiler
def test_other_bits_download_the_originals_again(root, published, capsys):
    folder, hub = published
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", hub.url)
    assert not pickles(folder)
    config = {"model": NAME, "device": "cpu", "language": "en", "source": (hub.url,)}
    ensure_edition(Config(quantize=4, **config), root)
    assert not pickles(folder)
    ensure_edition(Config(quantize=8, **config), root)
    assert len(pickles(folder)) == 3 and "downloaded again" in capsys.readouterr().out
    assert not kept(folder)


@needs_compiler
def test_a_lora_takes_the_originals_too(root, published):
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", published[1].url)
    config = Config(model=NAME, quantize=4, device="cpu", lora=root, language="en", source=(NOWHERE,))
    with pytest.raises(StartupError, match="Could not download"):
        ensure_edition(config, root)


@needs_compiler
def test_the_doctor_knows_what_was_pruned(root, published):
    folder, hub = published
    prune(root, NAME, "-q", "4", "--device", "cpu", "--source", hub.url)
    here = Machine(Config(model=NAME), root=root)
    here.hardware = lambda: Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=True)
    assert here.model() == Model(folder, []) and here.profile()[0].bits == 4
    result = check_model_files(here.model(), here.config, root, None, {})
    assert result.state is State.OK and "converted quantized/cpu-int4.safetensors" in result.finding.en
    here = Machine(Config(model=NAME, quantize=8), root=root)
    here.hardware = lambda: Hardware(ram_total=16 * 2**30, ram_available=8 * 2**30, cores=2, kernels=True)
    assert here.model().missing == sorted(f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3))

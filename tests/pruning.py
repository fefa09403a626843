"""Models whose originals are pruned, and the real processes that do it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.engine.kv_cache import KVCache
from server.kernels.build import available
from server.models.base import ForwardBatch, Segment
from server.models.loader import load_model
from tests.conftest import ROOT

DEMO = ROOT / "THUDM" / "demo"
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


def without_hub(tmp_path, monkeypatch) -> Path:
    """The root of a program that knows no model and no hub."""
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


def load_logits(folder, bits, ops):
    model = load_model(folder, dtype=torch.float32, device="cpu", bits=bits, ops=ops)
    kv = KVCache(model.network.kv_shape, 1, 64, model.kv_dtype, "cpu", model.prefix)
    with torch.inference_mode():
        return model.network.forward(ForwardBatch(torch.arange(3, 23), [Segment(0, 0, 20)], torch.arange(20)), kv)

"""The quantized network beside its model: made once, mapped later, made again when it is wrong, never in the way."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from server import converted, converting
from server.errors import ModelError
from server.file_lock import folder_lock
from server.kernels.build import NoKernels, available
from server.models import loader
from server.models.base import Context, ForwardBatch, Segment
from server.models.loader import load_model
from tests.conftest import ROOT
from tests.models.reference import OWN, complete_folder

if not available():
    pytest.skip("no C compiler for the CPU kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def ops():
    from server.kernels.cpu_ops import CpuOps

    try:
        return CpuOps(threads=2)
    except NoKernels as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    monkeypatch.setattr(loader, "CACHED_FROM", 0)


@pytest.fixture
def demo(tmp_path):
    return shutil.copytree(ROOT / "THUDM" / "demo", tmp_path / "模型 demo")


def logits(folder, ops, bits=4, **adapters):
    from server.engine.kv_cache import KVCache

    model = load_model(folder, dtype=torch.float32, device="cpu", bits=bits, ops=ops, **adapters)
    network = model.network
    kv = KVCache(network.kv_shape, 1, 64, model.kv_dtype, "cpu", model.prefix)
    ids = torch.arange(3, 23)
    context = Context(18, 17) if model.family.name == "chatglm" else None
    with torch.inference_mode():
        return network.forward(ForwardBatch(ids, [Segment(0, 0, 20, context)], torch.arange(20)), kv)


def cached(folder, bits=4):
    return folder / "quantized" / f"cpu-int{bits}.safetensors"


def no_filling(monkeypatch):
    def fill(*args):
        raise AssertionError("read the original weights")

    monkeypatch.setattr(loader, "_fill", fill)


@pytest.mark.parametrize("bits", [4, 8])
def test_second_start_reads_the_file_alone_and_computes_the_same(demo, ops, bits, monkeypatch):
    first = logits(demo, ops, bits)
    assert cached(demo, bits).is_file() and not list(demo.glob("**/.converting"))
    no_filling(monkeypatch)
    assert torch.equal(logits(demo, ops, bits), first)


@pytest.mark.parametrize(
    "name", ["small-chatglm", "small-chatglm-int4", "small-chatglm2-int4", "small-chatglm3-with-ptuning",
             "small-codegeex2"]
)  # fmt: skip
def test_every_kind_of_checkpoint(name, tmp_path, ops, monkeypatch):
    folder = complete_folder(name, tmp_path)
    first = logits(folder, ops)
    no_filling(monkeypatch)
    assert torch.equal(logits(folder, ops), first)


def test_a_quantized_embedding_is_not_kept(tmp_path, ops, caplog):
    folder = complete_folder("small-chatglm-int4-qe", tmp_path)
    assert torch.equal(logits(folder, ops), logits(folder, ops))
    assert not cached(folder).exists() and "made again" not in caplog.text


def test_a_file_that_lacks_a_tensor_leaves_the_network_empty(demo, ops, caplog):
    first = logits(demo, ops)
    with safe_open(cached(demo), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["transformer.encoder.final_layernorm.weight"]
    metadata["sums"] = json.dumps({name: json.loads(metadata["sums"])[name] for name in tensors})
    save_file(tensors, cached(demo), metadata)
    assert torch.equal(logits(demo, ops), first)
    assert "made again" in caplog.text and "unknown tensors" not in caplog.text


def test_a_copied_folder_needs_no_quantizing_and_is_hashed_once(demo, ops, tmp_path, monkeypatch):
    first = logits(demo, ops)
    other = shutil.copytree(demo, tmp_path / "copy", copy_function=shutil.copyfile)
    no_filling(monkeypatch)
    assert torch.equal(logits(other, ops), first)
    monkeypatch.setattr(converted, "sha256", lambda path: pytest.fail(f"hashed {path} again"))
    assert torch.equal(logits(other, ops), first)


def test_another_program_that_writes_is_not_disturbed(demo, ops, caplog):
    caplog.set_level("INFO")
    with folder_lock(demo):
        first = logits(demo, ops)
    assert "另一个程序" in caplog.text and "Another program" in caplog.text and not (demo / "quantized").exists()
    assert torch.equal(logits(demo, ops), first) and cached(demo).exists()


# config.json: what it says of the weights counts, the rest is the user's to change


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


@pytest.mark.parametrize("alone", [False, True])
def test_config_may_be_edited(demo, ops, monkeypatch, alone):
    logits(demo, ops)
    if alone:
        (demo / "model.safetensors").unlink()
    no_filling(monkeypatch)
    edit(demo, layernorm_epsilon=0.1, seq_length=123, eos_token_id=7)
    changed = logits(demo, ops)
    edit(demo, layernorm_epsilon=1e-5)
    assert not torch.equal(logits(demo, ops), changed)


@pytest.mark.parametrize("fields", [{"num_layers": 1}, {"ffn_hidden_size": 64}, {"padded_vocab_size": 3000},
                                    {"quantization_bit": 4}, {"add_qkv_bias": False}], ids=str)  # fmt: skip
def test_a_config_of_another_network_is_refused_before_anything_is_filled(demo, ops, fields):
    first = logits(demo, ops)
    (demo / "model.safetensors").unlink()
    before = (demo / "config.json").read_text("utf-8")
    edit(demo, **fields)
    with pytest.raises(ModelError, match="undo what was changed in config") as refused:
        logits(demo, ops)
    assert "把 config.json 改回去" in refused.value.zh and cached(demo).exists()
    (demo / "config.json").write_text(before, "utf-8")
    assert torch.equal(logits(demo, ops), first)


def test_a_changed_number_of_bits_is_quantized_again(demo, ops, caplog):
    logits(demo, ops)
    edit(demo, quantization_bit=4)
    logits(demo, ops)
    assert "of another config.json and is made again" in caplog.text


def test_a_changed_source_is_noticed(demo, ops, caplog):
    logits(demo, ops)
    weights = bytearray((demo / "model.safetensors").read_bytes())
    weights[-50:] = bytes(50)  # same size, other weights
    (demo / "model.safetensors").write_bytes(weights)
    after = logits(demo, ops)
    assert "made of another model.safetensors" in caplog.text
    shutil.rmtree(demo / "quantized")
    assert torch.equal(logits(demo, ops), after)


@pytest.mark.parametrize("kind", ["bit", "truncated", "empty", "text", "version"])
def test_damage_is_noticed_and_made_good(demo, ops, kind, caplog):
    first = logits(demo, ops)
    path = cached(demo)
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[len(content) // 2] ^= 4
    elif kind == "version":
        content = content.replace(b'"version": "\\"1\\""', b'"version": "\\"0\\""')
    else:
        content = {"truncated": content[:-100], "empty": b"", "text": b"<html>" * 100}[kind]
    assert content != path.read_bytes()
    path.write_bytes(content)
    assert torch.equal(logits(demo, ops), first)
    assert "is made again" in caplog.text
    caplog.clear()
    assert torch.equal(logits(demo, ops), first) and "made again" not in caplog.text


def test_a_full_disk_leaves_the_old_file_and_a_sentence(demo, ops, monkeypatch, caplog):
    logits(demo, ops)
    before = cached(demo).read_bytes()
    edit(demo, quantization_bit=4)
    usage = shutil.disk_usage(demo)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert logits(demo, ops).isfinite().all()
    assert "磁盘要" in caplog.text and "make room" in caplog.text
    assert cached(demo).read_bytes() == before and not (demo / "quantized" / ".converting").exists()


@pytest.fixture
def on_small_disk(small_disk, demo):
    return shutil.copytree(demo, small_disk / "demo")


def test_a_disk_that_fills_up_while_it_is_written(on_small_disk, ops, monkeypatch, caplog):
    (on_small_disk.parent / "others").write_bytes(bytes(6 * 10**6))
    usage = shutil.disk_usage(on_small_disk)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    assert logits(on_small_disk, ops).isfinite().all()
    assert "make room" in caplog.text and not [*(on_small_disk / "quantized").iterdir()]


def test_a_folder_that_cannot_be_written_is_used_all_the_same(on_small_disk, ops, caplog):
    subprocess.run(["mount", "-o", "remount,ro", str(on_small_disk.parent)], check=True)
    assert logits(on_small_disk, ops).isfinite().all()
    assert "照样能用" in caplog.text and os.strerror(errno.EROFS) in caplog.text


def test_what_the_file_says_of_itself(demo, ops):
    logits(demo, ops)
    with safe_open(cached(demo), "pt") as file:
        said = {name: json.loads(value) for name, value in file.metadata().items()}
    assert said["version"] == converted.VERSION
    assert {source["name"] for source in said["sources"]} == {"model.safetensors"}
    assert all(len(source["sha256"]) == 64 for source in said["sources"])
    header = json.loads(cached(demo).read_bytes()[8 : 2**20])
    places = [entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    with safe_open(cached(demo), "pt") as file:
        sizes = {name: file.get_tensor(name).itemsize for name in file.keys()}  # noqa: SIM118
    assert len(set(sizes.values())) > 1 and places == sorted(places), "not in the order of the file"
    in_order = [sizes[name] for name in header if name != "__metadata__"]
    assert in_order == sorted(in_order, reverse=True), "a tensor may begin where its numbers cannot"


def test_an_adapter_is_merged_into_the_original_weights(tmp_path, ops):
    base = complete_folder("small-chatglm2", tmp_path)
    plain = logits(base, ops)
    assert not torch.equal(logits(base, ops, lora=OWN / "small-chatglm2-lora"), plain)
    assert torch.equal(logits(base, ops), plain)

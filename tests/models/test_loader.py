"""Every layout of a checkpoint gives the same network, and every damage is refused with a sentence that names it."""

import io
import json
import logging
import subprocess
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from server.errors import ModelError
from server.kernels.torch_ops import TorchOps
from server.models.chatglm.prompt import ChatGLM
from server.models.chatglm2.prompt import ChatGLM2
from server.models.files import read_json
from server.models.loader import load_model, load_network
from server.quant.linear import QuantLinear
from tests.conftest import ROOT
from tests.models.reference import OWN, complete_folder

SOURCE = OWN / "tiny-chatglm2"
CONFIG = read_json(SOURCE / "config.json")
WEIGHTS = load_file(SOURCE / "model.safetensors")
QKV = "transformer.encoder.layers.0.self_attention.query_key_value"
EMBEDDING = "transformer.embedding.word_embeddings.weight"


def load(folder, config=CONFIG, *, dtype=torch.float32, **options):
    return load_network(folder, config, ChatGLM2(), dtype=dtype, device="cpu", ops=TorchOps(), **options)


def refused(folder, config=CONFIG) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(folder, config)
    return caught.value


def halves():
    """The weights in two shards, the layers out of order: a module's bias may come before its weight."""
    names = sorted(WEIGHTS)
    return [{n: WEIGHTS[n].clone() for n in part} for part in (names[::2], names[1::2])]


def save(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def write_shards(folder, name, *, index):
    """``name`` with {} for the shard's number; returns the shards' paths."""
    paths = [folder / name.format(f"{i:05}-of-00002") for i in (1, 2)]
    for tensors, path in zip(halves(), paths, strict=True):
        save(tensors, path)
    if index:
        places = {n: path.name for tensors, path in zip(halves(), paths, strict=True) for n in tensors}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    return paths


def write_safetensors_shards(folder):
    write_shards(folder, "model-{}.safetensors", index=None)


def write_safetensors_index(folder):
    write_shards(folder, "model-{}.safetensors", index="model.safetensors.index.json")


def write_bin(folder):
    save(WEIGHTS, folder / "pytorch_model.bin")


def write_legacy_bin(folder):
    torch.save(WEIGHTS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_bin_shards(folder):
    write_shards(folder, "pytorch_model-{}.bin", index=None)


def write_bin_index(folder):
    write_shards(folder, "pytorch_model-{}.bin", index="pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    "write",
    [write_safetensors_shards, write_safetensors_index, write_bin, write_legacy_bin, write_bin_shards, write_bin_index],
)
def test_every_layout_gives_the_same_network(tmp_path, write):
    folder = tmp_path / "模型 一"
    folder.mkdir()
    write(folder)
    network, prefix = load(folder)
    assert prefix is None
    state = network.state_dict()
    assert state.keys() == WEIGHTS.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, WEIGHTS[name].float()), name
        assert not tensor.requires_grad
    # nothing holds the files: on Windows they could not be replaced
    for path in folder.iterdir():
        path.unlink()


def test_progress_ends_with_everything(tmp_path):
    write_safetensors_shards(tmp_path)
    seen = []
    load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len(seen) == len(WEIGHTS)
    done, total = seen[-1]
    assert 0.7 * total < done <= total  # the headers of so small files are the rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(dtype):
    network, _ = load(SOURCE, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {dtype}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_while_it_is_read(tmp_path, bits):
    write_safetensors_shards(tmp_path)
    network, _ = load(tmp_path, bits=bits)
    quantized = [module for module in network.modules() if isinstance(module, QuantLinear)]
    assert len(quantized) == 4 * CONFIG["num_layers"] + 1
    assert {module.bits for module in quantized} == {bits}
    assert not [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    bias = network.get_submodule(QKV).bias
    assert torch.equal(bias, WEIGHTS[QKV + ".bias"].float())


def official(bits):
    """The tiny checkpoint as quantization.py of the official repositories would store it."""
    tensors = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    for name, weight in WEIGHTS.items():
        if ".layers." in name and weight.dim() == 2:
            scale = weight.abs().amax(1) / (7 if bits == 4 else 127)
            codes = (weight / scale[:, None]).round().to(torch.int8)
            tensors[name] = codes if bits == 8 else (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)
            tensors[name + "_scale"] = scale
    return tensors


@pytest.mark.parametrize(
    ("stored", "bits", "layers", "output"),
    [(4, 16, None, None), (8, 16, None, None), (4, 4, 4, None), (4, 8, 4, None), (8, 8, 8, None), (8, 4, 4, 4)],
)
def test_official_quantized_checkpoint(tmp_path, stored, bits, layers, output):
    save(official(stored), tmp_path / "pytorch_model.bin")
    network, _ = load(tmp_path, {**CONFIG, "quantization_bit": stored}, bits=bits)
    assert getattr(network.get_submodule(QKV), "bits", None) == layers
    assert getattr(network.transformer.output_layer, "bits", None) == output


def test_tuned_prefix_needs_no_field_in_the_configuration(tmp_path):
    shape = (2, 2, 2, 8)  # layers, key and value, groups, head_dim
    embedding = torch.randn(3, 64)
    prefix_tensors = {"transformer.prefix_encoder.embedding.weight": embedding}
    save({**WEIGHTS, **prefix_tensors}, tmp_path / "model.safetensors")
    _, (keys, values) = load(tmp_path)
    assert keys.shape == values.shape == (2, 3, 2, 8)
    assert torch.equal(keys[1, 2], embedding.view(3, *shape)[2, 1, 0])
    assert torch.equal(values[0, 1], embedding.view(3, *shape)[1, 0, 1])


def test_tuned_prefix_of_another_model(tmp_path):
    save({**WEIGHTS, "transformer.prefix_encoder.embedding.weight": torch.zeros(3, 60)}, tmp_path / "model.safetensors")
    error = refused(tmp_path)
    assert "60" in error.en and "64" in error.en


def test_tuned_prefix_that_is_not_there():
    error = refused(SOURCE, {**CONFIG, "pre_seq_len": 4})
    assert "transformer.prefix_encoder.embedding.weight" in error.en
    assert "transformer.prefix_encoder.embedding.weight" in error.zh


def test_needless_tensors_are_ignored_and_unknown_ones_logged(tmp_path, caplog):
    extra = {"transformer.rotary_pos_emb.inv_freq": torch.ones(2), "value_head.weight": torch.ones(2)}
    save({**WEIGHTS, **extra}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "ignored 1 unknown" in caplog.text and "value_head.weight" in caplog.text


def lines_of(error):
    assert "\n" not in error.en and "\n" not in error.zh
    return error.en, error.zh


def names(error, *parts):
    for sentence in lines_of(error):
        for part in parts:
            assert str(part) in sentence


def test_folder_without_weights(tmp_path):
    names(refused(tmp_path), tmp_path, "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", None])
@pytest.mark.parametrize("lost", [0, 1])
def test_missing_shard(tmp_path, index, lost):
    path = write_shards(tmp_path, "pytorch_model-{}.bin", index=index)[lost]
    path.unlink()
    names(refused(tmp_path), path)


def test_missing_tensor(tmp_path):
    lost = QKV + ".bias"
    save({n: t for n, t in WEIGHTS.items() if n != lost}, tmp_path / "model.safetensors")
    names(refused(tmp_path), tmp_path, lost, 1)


def test_missing_scale(tmp_path):
    tensors = official(4)
    del tensors[QKV + ".weight_scale"]
    save(tensors, tmp_path / "model.safetensors")
    names(refused(tmp_path, {**CONFIG, "quantization_bit": 4}), QKV + ".weight_scale")


def test_wrong_shape_of_a_weight_and_of_codes(tmp_path):
    save({**WEIGHTS, EMBEDDING: torch.zeros(65, 24)}, tmp_path / "model.safetensors")
    names(refused(tmp_path), EMBEDDING, [65, 24], [64, 24])
    save({**official(4), QKV + ".weight": torch.zeros(80, 11, dtype=torch.int8)}, tmp_path / "model.safetensors")
    names(refused(tmp_path), QKV + ".weight", [80, 11], [80, 12])
    save({**official(4), QKV + ".weight_scale": torch.zeros(79)}, tmp_path / "model.safetensors")
    names(refused(tmp_path), QKV + ".weight_scale", [79], [80])


def saved(name):
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    return (SOURCE / "model.safetensors").read_bytes() if name.endswith("safetensors") else buffer.getvalue()


DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "truncated": (lambda content: content[:-100], "incomplete"),
    "cut in the header": (lambda content: content[:60], "incomplete"),
    "web page": (lambda content: b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "web page"),
    "lfs pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 9\n", "git lfs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights(tmp_path, name, damage):
    change, said = DAMAGES[damage]
    path = tmp_path / name
    path.write_bytes(change(saved(name)))
    error = refused(tmp_path)
    names(error, path)
    assert said in error.en


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        b"[1]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
    ],
)
def test_safetensors_with_a_wrong_header(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    names(refused(tmp_path), path)


def test_safetensors_with_a_wrong_size(tmp_path):
    path = tmp_path / "model.safetensors"
    header = b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    names(refused(tmp_path), path, "x")


class Evil:
    def __reduce__(self):
        return print, ("a pickle was run",)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": Evil()}, path)
    names(refused(tmp_path), path)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2)])
def test_bin_that_is_no_state_dict(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    names(refused(tmp_path), path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]", "{", "<html>"])
def test_damaged_index(tmp_path, content):
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(content, encoding="utf-8")
    names(refused(tmp_path), path)


def test_index_does_not_lead_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save(WEIGHTS, tmp_path / "outside.bin")
    index = {"weight_map": {EMBEDDING: "../outside.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    names(refused(folder), folder / "outside.bin")


@pytest.fixture(scope="module")
def tiny_tokenizer():
    """A sentencepiece model with few enough pieces for the tiny network."""
    model = io.BytesIO()
    text = ["the cat sat on the mat", "a dog and a cat", "it is not the same", "ten times ten"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    return model.getvalue()


@pytest.fixture
def whole_folder(tmp_path, tiny_tokenizer):
    folder = tmp_path / "chatglm2-小"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((SOURCE / name).read_bytes())
    return folder


def test_load_model(whole_folder):
    model = load_model(str(whole_folder), dtype=torch.float32, device="cpu", ops=TorchOps())
    assert (model.name, model.family.name, model.prefix) == ("chatglm2-小", "chatglm2", None)
    assert model.network.vocab_size == 64 and model.tokenizer.vocab_size == 45
    assert model.tokenizer.decode(model.tokenizer.encode("the cat")) == "the cat"
    assert model.config["num_layers"] == 2
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


def test_tokenizer_of_another_model(whole_folder):
    config = {**CONFIG, "padded_vocab_size": 44}
    (whole_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    cut = {n: t[:44].clone() if t.shape[0] == 64 else t for n, t in WEIGHTS.items()}
    save_file(cut, whole_folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(whole_folder, dtype=torch.float32, device="cpu", ops=TorchOps())
    names(caught.value, whole_folder, 45, 44, "tokenizer.model")


def test_first_generations_tokenizer_is_named_as_it_is(tmp_path):
    folder = complete_folder("small-chatglm", tmp_path)
    tokenizer = ChatGLM().load_tokenizer(folder)
    config = read_json(folder / "config.json")
    rows = tokenizer.vocab_size - 1
    weights = load_file(folder / "model.safetensors")
    cut = {n: t[:rows].clone() if t.shape[0] == config["vocab_size"] else t for n, t in weights.items()}
    save_file(cut, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_model(folder, dtype=torch.float32, device="cpu", ops=TorchOps())
    names(caught.value, folder, rows, "ice_text.model")


@pytest.mark.parametrize("change", [{"num_layers": "2"}, {"kv_channels": 6}, {"layernorm_epsilon": None}], ids=str)
def test_wrong_field_is_named_with_its_file(whole_folder, change):
    (whole_folder / "config.json").write_text(json.dumps({**CONFIG, **change}), encoding="utf-8-sig")
    with pytest.raises(ModelError) as caught:
        load_model(whole_folder, dtype=torch.float32, device="cpu", ops=TorchOps())
    names(caught.value, whole_folder / "config.json", *change)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "<!doctype html>"])
def test_wrong_configuration_file(whole_folder, content):
    path = whole_folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        load_model(whole_folder, dtype=torch.float32, device="cpu", ops=TorchOps())
    names(caught.value, path)


def write_adapter(folder, shapes, rank=16):
    """Of rank ``rank`` on every matrix of the layers."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[module + ".lora_A.weight"] = torch.ones(rank, shape[1])
            tensors[module + ".lora_B.weight"] = torch.ones(shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


LOAD = """
import sys, torch
from server.kernels.torch_ops import TorchOps
from server.models.loader import load_model
load_model(sys.argv[1], dtype=torch.float32, device="cpu", ops=TorchOps())
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("name", ["small-chatglm", "small-chatglm2-int4"])
def test_a_start_does_not_import_the_compiler_of_torch(tmp_path, name):
    """That takes seconds, and the memory of hundreds of modules."""
    command = [sys.executable, "-c", LOAD, str(complete_folder(name, tmp_path))]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


LOAD_AND_MEASURE = """
import resource, sys, torch
from pathlib import Path
from server.kernels.torch_ops import TorchOps
from server.models.chatglm2.prompt import ChatGLM2
from server.models.files import read_json
from server.models.loader import load_network
from server.kernels.quantize import quantize
quantize(torch.randn(64, 64), 4)  # what torch itself needs at its first steps
folder, lora = Path(sys.argv[1]), Path(sys.argv[3]) if sys.argv[3:] else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
network, _ = load_network(
    folder, read_json(folder / "config.json"), ChatGLM2(),
    dtype=torch.bfloat16, device="cpu", bits=int(sys.argv[2]), ops=TorchOps(), lora=lora,
)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(("bits", "allowed_share"), [(16, 1.35), (4, 0.75)])
def test_peak_memory_is_the_finished_model_and_one_tensor(tmp_path, bits, allowed_share, lora):
    """A checkpoint of 150 MB whose largest tensor has 34 MB; the adapter, of 3 MB, changes every matrix of a layer."""
    config = {**CONFIG, "hidden_size": 1024, "ffn_hidden_size": 2048, "num_layers": 6, "padded_vocab_size": 16384}
    network = ChatGLM2().build_network(config, TorchOps())
    shapes = {name: p.shape for name, p in network.named_parameters()}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path), str(bits)]
    if lora:
        command.append(str(write_adapter(tmp_path / "lora", shapes)))
    measured = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(measured.stdout) < allowed_share * size
    assert size > 140e6

"""Folders given with --ptuning and --lora: what is wrong with one is said before a model is downloaded for it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters import _steps, check_adapters, check_model, with_prefix
from server.assembly import prepare
from server.config import Config
from server.errors import ModelError
from server.footprint import ModelShape
from tests.test_profiles import CHATGLM2_6B, CHATGLM_6B

SHAPE = ModelShape.from_config({**CHATGLM2_6B, "pre_seq_len": 64})
PTUNING = ("pytorch_model.bin",)
LORA = ("adapter_config.json", "adapter_model.safetensors")


def folder_with(path, *names):
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_bytes(b"x")
    return path


def refused(*parts, **options) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_adapters(Config(**options))
    assert caught.value.param == next(iter(options))
    for sentence in (caught.value.zh, caught.value.en):
        assert "\n" not in sentence
        for part in parts:
            assert str(part) in sentence, sentence
    return caught.value


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("ptuning", PTUNING),
        ("ptuning", ("model.safetensors", "config.json")),
        ("ptuning", ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")),
        ("lora", LORA),
        ("lora", ("adapter_config.json", "adapter_model.bin")),
    ],
)
def test_complete_folders(tmp_path, option, names):
    check_adapters(Config(**{option: folder_with(tmp_path / "一 b", *names)}))


@pytest.mark.parametrize("option", ["ptuning", "lora"])
def test_folder_that_is_not_there(tmp_path, option):
    refused(tmp_path / "nothing", f"--{option}", **{option: tmp_path / "nothing"})


@pytest.mark.parametrize("option", ["ptuning", "lora"])
def test_file_instead_of_its_folder(tmp_path, option):
    folder = folder_with(tmp_path / "x", "adapter_model.bin")
    refused(f"--{option} {folder}", **{option: folder / "adapter_model.bin"})


@pytest.mark.parametrize(
    ("option", "names", "lacking"),
    [
        ("ptuning", ("config.json", "trainer_state.json"), "pytorch_model*.bin"),
        ("lora", ("adapter_model.bin",), "adapter_config.json"),
        ("lora", ("adapter_config.json",), "adapter_model.safetensors"),
    ],
)
def test_folder_that_lacks_files(tmp_path, option, names, lacking):
    folder = folder_with(tmp_path / "x", *names)
    refused(folder, lacking, f"--{option}", **{option: folder})


def test_the_other_kind_of_folder(tmp_path):
    lora, tuned, model = (folder_with(tmp_path / "a b" / name, *files) for name, files in (
        ("lora", LORA), ("tuned", PTUNING), ("model", (*PTUNING, "tokenizer.model"))
    ))  # fmt: skip
    refused(f"--lora {lora}", ptuning=lora)
    (tuned / "config.json").write_text('{"pre_seq_len": 8}', encoding="utf-8-sig")
    assert "--model" not in refused(f"--ptuning {tuned}", lora=tuned).en
    for content in ("{}", '{"pre_seq_len": null}', "[]", "{"):
        (model / "config.json").write_text(content, encoding="utf-8")
        assert "--ptuning" not in refused(f"--model {model}", lora=model).en


@pytest.mark.parametrize(
    ("option", "names"), [("ptuning", PTUNING), ("lora", ("adapter_config.json", "adapter_model.bin"))]
)
def test_the_sub_folder_that_fits_is_named(tmp_path, option, names):
    """The last checkpoint of a training, where there are several."""
    parent = folder_with(tmp_path / "输出 1", "trainer_state.json")
    (parent / "checkpoint-9000").mkdir()
    folder_with(parent / "checkpoint-500", *names)
    refused(f"--{option} {parent / 'checkpoint-500'}", **{option: parent})
    folder_with(parent / "checkpoint-3000", *names)
    refused(f"--{option} {parent / 'checkpoint-3000'}", **{option: parent})


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True))
def test_the_last_checkpoint_has_most_steps(steps):
    folders = [Path(f"run2/checkpoint-{n}") for n in steps]
    assert max(folders, key=_steps).name == f"checkpoint-{max(steps)}"


def given_as_model(folder) -> ModelError:
    with pytest.raises(ModelError) as caught:
        prepare(Config(model=str(folder), endpoint="http://127.0.0.1:9"))
    assert caught.value.param == "model"
    for sentence in (caught.value.zh, caught.value.en):
        assert "\n" not in sentence and str(folder) in sentence and "--model" in sentence
    return caught.value


def test_lora_given_as_the_model(tmp_path):
    error = given_as_model(folder_with(tmp_path / "x", *LORA))
    assert f"--lora {tmp_path / 'x'}" in error.zh and f"--lora {tmp_path / 'x'}" in error.en


@pytest.mark.parametrize("more", [(), ("ice_text.model", "tokenizer_config.json")], ids=["weights", "with tokenizer"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("bits", [{}, {"quantization_bit": 4}], ids=str)
def test_ptuning_given_as_the_model(tmp_path, more, file, bits):
    folder = folder_with(tmp_path / "checkpoint-3000", *more)
    for name in (file, *more):
        (folder / name).write_bytes(b"x" * 5000)
    config = {"model_type": "chatglm", "position_encoding_2d": True, "pre_seq_len": 128, **CHATGLM_6B, **bits}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = given_as_model(folder)
    assert f"--ptuning {folder}" in error.zh and f"--ptuning {folder}" in error.en


def test_a_whole_model_is_no_adapter(tmp_path):
    """One that was trained on: with its own prefix, or with an adapter's files still beside its weights."""
    config = {**CHATGLM2_6B, "pre_seq_len": 128, "model_type": "chatglm"}
    config |= {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "padded_vocab_size": 8}
    folder = folder_with(tmp_path / "x", *LORA)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.model", "model.safetensors"):
        (folder / name).write_bytes(b"x" * 10**6)
    check_model(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "adapter_config.json").unlink()
    check_model(folder)  # what is missing is said elsewhere
    check_model(tmp_path / "not downloaded yet")


@pytest.mark.parametrize("option", ["ptuning", "lora"])
def test_before_anything_is_downloaded(tmp_path, option):
    """Nobody listens at this endpoint: asking it would be another error."""
    config = Config(model="chatglm2-6b", endpoint="http://127.0.0.1:9", **{option: tmp_path / "nothing"})
    with pytest.raises(ModelError, match="There is no folder"):
        prepare(config)


@pytest.mark.parametrize(
    ("content", "prefix"),
    [({"pre_seq_len": 128}, 128), ({}, 64), ({"pre_seq_len": None}, 64), (None, 64), ("{", 64)],
)
def test_memory_of_the_prefix(tmp_path, content, prefix):
    """Its own config.json says how long it is, or the base model's."""
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert with_prefix(SHAPE, tmp_path).prefix == prefix
    assert with_prefix(SHAPE, None) == SHAPE

"""Folders given with --ptuning and --lora: what is wrong with one is said before a model is downloaded for it."""

import json

import pytest

from server.adapters import check_adapters, with_prefix
from server.assembly import prepare
from server.config import Config
from server.errors import ModelError
from server.footprint import ModelShape
from tests.test_profiles import CHATGLM2_6B

SHAPE = ModelShape.from_config({**CHATGLM2_6B, "pre_seq_len": 64})
PTUNING = ("pytorch_model.bin",)
LORA = ("adapter_config.json", "adapter_model.safetensors")


def folder_with(path, *names):
    path.mkdir()
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
    refused("--lora", ptuning=folder_with(tmp_path / "a", *LORA))
    refused("--ptuning", lora=folder_with(tmp_path / "b", *PTUNING))


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

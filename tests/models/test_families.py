"""Which generation a folder is of, told from its files; what fits none is refused, saying what was looked at."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from server.assembly import prepare, print_choice
from server.config import Config
from server.errors import ModelError
from server.footprint import ModelShape
from server.hardware import Hardware
from server.kernels.torch_ops import TorchOps
from server.models import generations
from server.models.chatglm2.model import Rotary
from server.models.families import families, find_family
from server.models.files import read_json
from server.profiles import choose
from tests.models.reference import DATA, OWN
from tests.oracle import ROOT, oracle_file

BLOCK = {k: v for k, v in read_json(OWN / "tiny-chatglm2" / "config.json").items() if not k.startswith("_")}
FIRST = {"model_type": "chatglm", "inner_hidden_size": 16384, "position_encoding_2d": True, "vocab_size": 130528}
CODE = {"torch_dtype": "bfloat16", "rotary_percent": 0.5, "interleaved_qkv": False}
ROLES = 'special_tokens = ["[MASK]", "<|system|>", "<|user|>"]\nraise SystemExit("never run")\n'
NO_ROLES = 'special_tokens = ["[MASK]", "[gMASK]"]\nraise SystemExit("never run")\n'
OLD_TOKENIZER = json.dumps({"name_or_path": "THUDM/chatglm2-6b", "tokenizer_class": "ChatGLMTokenizer"})
GLM4_TOKENIZER = json.dumps({"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": {}})
ADDED = json.dumps({"added_tokens_decoder": {"64795": {"content": "<|user|>", "special": True}}})
TEMPLATE = json.dumps({"chat_template": "{% for message in messages %}<|user|>{% endfor %}"})


def name(value):
    return {"_name_or_path": value}


CASES = {
    "nothing says otherwise": (BLOCK, "model", {}, "chatglm2"),
    "renamed ChatGLM2": (BLOCK, "model", {"tokenization_chatglm.py": NO_ROLES}, "chatglm2"),
    "ChatGLM2 as it is": (
        BLOCK | name("THUDM/chatglm2-6b"), "model", {"tokenizer_config.json": OLD_TOKENIZER}, "chatglm2",
    ),
    "ChatGLM2-32k": (BLOCK | name("THUDM/chatglm2-6b-32k") | {"rope_ratio": 16}, "m", {}, "chatglm2"),
    "ChatGLM2 in bfloat16": (BLOCK | {"torch_dtype": "bfloat16"}, "model", {}, "chatglm2"),
    "ChatGLM2 with one strange field": (BLOCK | {"rotary_percent": 0.5}, "model", {}, "chatglm2"),
    "renamed ChatGLM3": (BLOCK, "model", {"tokenization_chatglm.py": ROLES}, "chatglm3"),
    "ChatGLM3 that says chatglm2": (
        BLOCK | name("/models/chatglm2-6b"), "chatglm2", {"tokenization_chatglm.py": ROLES}, "chatglm3",
    ),
    "ChatGLM3's added tokens": (BLOCK, "model", {"tokenizer_config.json": ADDED}, "chatglm3"),
    "ChatGLM3's template": (
        BLOCK, "model", {"tokenizer_config.json": TEMPLATE, "tokenization_chatglm.py": NO_ROLES}, "chatglm3",
    ),
    "ChatGLM3's template as a file": (BLOCK, "model", {"chat_template.jinja": "<|user|>"}, "chatglm3"),
    "ChatGLM3's special tokens": (
        BLOCK, "m", {"special_tokens_map.json": '{"additional_special_tokens": ["<|user|>"]}'}, "chatglm3",
    ),
    "ChatGLM3 by its folder": (BLOCK, "chatglm3-6b", {}, "chatglm3"),
    "ChatGLM3 by its origin": (BLOCK | name("THUDM/ChatGLM3-6B"), "model", {}, "chatglm3"),
    "ChatGLM3 by its tokenizer's origin": (
        BLOCK | name("/tmp/x"), "m", {"tokenizer_config.json": '{"name_or_path": "THUDM/chatglm3-6b"}'}, "chatglm3",
    ),
    "ChatGLM3-128k": (BLOCK | {"rope_ratio": 500, "seq_length": 131072}, "ChatGLM3-6B-128K", {}, "chatglm3"),
    "ChatGLM3-6b-base": (BLOCK | name("THUDM/chatglm3-6b-base"), "base", {}, "chatglm3"),
    "the origin before the folder": (BLOCK | name("THUDM/chatglm2-6b"), "chatglm3-6b", {}, "chatglm2"),
    "code before names": (
        BLOCK | name("chatglm3"), "chatglm3-6b", {"tokenization_chatglm.py": NO_ROLES}, "chatglm2",
    ),
    "a name that says two things": (BLOCK | name("chatglm2-to-chatglm3"), "chatglm3", {}, "chatglm3"),
    "32k is not ChatGLM3": (BLOCK, "chatglm-32k", {}, "chatglm2"),
    "CodeGeeX2 as it is": (
        BLOCK | CODE | name("THUDM/codegeex2-6b"), "m", {"tokenization_chatglm.py": NO_ROLES}, "codegeex2",
    ),
    "renamed CodeGeeX2": (BLOCK | CODE, "model", {}, "codegeex2"),
    "CodeGeeX2 in float16": (BLOCK | CODE | {"torch_dtype": "float16"}, "model", {}, "codegeex2"),
    "CodeGeeX2 by its folder": (BLOCK, "codegeex2-6b-int4", {"tokenization_chatglm.py": NO_ROLES}, "codegeex2"),
    "CodeGeeX2 in bfloat16 without its fields": (
        BLOCK | {"torch_dtype": "bfloat16"} | name("CodeGeeX2-6B"), "model", {}, "codegeex2",
    ),
    "ChatGLM-6B": (FIRST, "model", {}, "chatglm"),
    "ChatGLM-6B of March 2023": (FIRST | {"vocab_size": 150528}, "chatglm2", {}, "chatglm"),
    "broken tokenizer_config.json": (BLOCK, "chatglm3-6b", {"tokenizer_config.json": "{"}, "chatglm3"),
    "a list in tokenizer_config.json": (BLOCK, "chatglm3-6b", {"tokenizer_config.json": "[1]"}, "chatglm3"),
}  # fmt: skip


GUESSED = {
    "nothing says otherwise",
    "renamed ChatGLM2",
    "ChatGLM2 in bfloat16",
    "ChatGLM2 with one strange field",
    "32k is not ChatGLM3",
    "code before names",
}


def folder_with(tmp_path, folder, files):
    path = tmp_path / folder
    path.mkdir()
    for file, content in files.items():
        (path / file).write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_generation_of_a_folder(tmp_path, case):
    config, folder, files, expected = CASES[case]
    path = folder_with(tmp_path, folder, files)
    assert find_family(config, path).name == expected
    assert generations.tell(config, path) == (expected, case in GUESSED)
    assert [family.name for family in families() if family.matches(config, path)] == [expected]
    assert all(find_family(config, path, family.name).name == family.name for family in families())


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("chatglm2-6b-first-release.json", "chatglm2"),
        ("chatglm2-6b-32k.json", "chatglm2"),
        ("chatglm2-6b-int4.json", "chatglm2"),
        ("chatglm3-6b.json", "chatglm3"),
        ("codegeex2-6b.json", "codegeex2"),
        ("chatglm-6b.json", "chatglm"),
        ("chatglm-6b-int4.json", "chatglm"),
    ],
)
def test_official_configurations(tmp_path, file, expected):
    config = read_json(oracle_file("configs", file))
    assert find_family(config, tmp_path).name == expected


def test_the_shared_tokenizer_is_not_codegeex2s(tmp_path):
    source = DATA / "chatglm2-tokenizer" / "tokenizer.model"
    if not source.exists():
        pytest.skip(f"no official tokenizer at {source} (set DATA_DIR)")
    shutil.copy(source, tmp_path)
    assert find_family(BLOCK | CODE | name("codegeex2-chatglm2-merge"), tmp_path).name == "chatglm2"
    assert find_family(BLOCK | name("THUDM/codegeex2-6b"), tmp_path).name == "chatglm2"
    assert find_family(BLOCK | name("THUDM/chatglm3-6b"), tmp_path).name == "chatglm3"


def test_codegeex2s_tokenizer_decides(tmp_path, monkeypatch):
    """Its file is not here, so another takes its place: one of the demo, under its own hash."""
    shutil.copy(ROOT / "THUDM" / "demo" / "tokenizer.model", tmp_path)
    data = (tmp_path / "tokenizer.model").read_bytes()
    monkeypatch.setattr(generations, "_TOKENIZER_SIZE", len(data))
    monkeypatch.setitem(generations._SHA256, generations.hashlib.sha256(data).hexdigest(), True)
    assert find_family(BLOCK | name("THUDM/chatglm2-6b"), tmp_path).name == "codegeex2"
    (tmp_path / "tokenizer.model").write_bytes(data[:-1] + b"x")
    assert find_family(BLOCK | name("THUDM/chatglm2-6b"), tmp_path).name == "chatglm2"


def test_a_folder_without_a_name_of_its_own(tmp_path, monkeypatch):
    path = folder_with(tmp_path, "chatglm3-6b", {})
    monkeypatch.chdir(path)
    assert find_family(BLOCK, type(path)(".")).name == "chatglm3"


@pytest.mark.parametrize(
    ("model", "ratio", "meaning"),
    [("chatglm2-6b-32k", 16, {"divisor": 16.0}), ("chatglm3-6b-32k", 50, {"base": 500000.0})],
)
def test_rope_ratio_means_what_the_family_makes_of_it(tmp_path, model, ratio, meaning):
    config = BLOCK | name(model) | {"rope_ratio": ratio}
    network = find_family(config, tmp_path).build_network(config, TorchOps())
    positions = torch.arange(0, 40000, 1001)
    assert torch.equal(network._rotary.cos_sin(positions), Rotary(4, **meaning).cos_sin(positions))


REFUSED = {
    "llama": (
        {"model_type": "llama", "vocab_size": 32000}, {}, ("model_type is 'llama'", "padded_vocab_size is missing"),
    ),
    "llama with our fields": (BLOCK | {"model_type": "llama"}, {}, ("model_type is 'llama'",)),
    "no fields": ({"model_type": "chatglm"}, {}, ("model_type is 'chatglm'", "multi_query_attention is missing")),
    "empty": ({}, {}, ("model_type is missing", "inner_hidden_size is missing")),
    "half of the block": (
        {"model_type": "chatglm", "padded_vocab_size": 65024},
        {},
        ("padded_vocab_size is 65024", "multi_query_attention is missing"),
    ),
    "GLM-4": (
        BLOCK | {"padded_vocab_size": 151552, "rope_ratio": 500},
        {"tokenizer_config.json": GLM4_TOKENIZER, "tokenization_chatglm.py": "import tiktoken  # <|user|>"},
        ("looks like GLM-4", "padded_vocab_size is 151552", "tokenizer_class is 'ChatGLM4Tokenizer'"),
    ),
    "GLM-4 by its vocabulary": (BLOCK | {"padded_vocab_size": 151552}, {}, ("looks like GLM-4", "151552")),
    "GLM-4 by its tokenizer": (BLOCK, {"tokenizer_config.json": GLM4_TOKENIZER}, ("GLM-4", "ChatGLM4Tokenizer")),
    "GLM-4 by its code": (BLOCK, {"tokenization_chatglm.py": "import tiktoken"}, ("looks like GLM-4",)),
    "GLM of transformers": (
        {"model_type": "glm", "num_hidden_layers": 40}, {}, ("looks like GLM", "model_type is 'glm'"),
    ),
    "GLM of transformers with our fields": (BLOCK | {"model_type": "glm"}, {}, ("model_type is 'glm'",)),
    "VisualGLM": (
        FIRST | {"eva_config": {"num_layers": 39}}, {}, ("looks like VisualGLM", "eva_config is {"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_fits_none_is_refused_with_what_was_looked_at(tmp_path, case):
    config, files, said = REFUSED[case]
    path = folder_with(tmp_path, "chatglm3-6b", files)
    assert not any(family.matches(config, path) for family in families())
    with pytest.raises(ModelError) as caught:
        find_family(config, path)
    for part in said:
        assert part in caught.value.en
        assert part.replace("looks like", "更像").replace(" is ", " 是 ").removesuffix(" 是 missing") in caught.value.zh
    for text in (caught.value.en, caught.value.zh):
        assert str(path / "config.json") in text and "--family" in text and "codegeex2" in text
        assert text.count("\n") == 0 and len(text) < 600
    assert find_family(config, path, "chatglm2").name == "chatglm2"


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_before_its_files_are_asked_for(tmp_path, case):
    """A start: these folders lack tokenizer and weights, and some the fields that the profile is chosen by."""
    config, files, said = REFUSED[case]
    path = folder_with(tmp_path, "model", files | {"config.json": json.dumps(config)})
    with pytest.raises(ModelError) as caught:
        prepare(Config(model=str(path), language="en"))
    assert all(part in caught.value.en for part in said)
    with pytest.raises(ModelError) as caught:
        prepare(Config(model=str(path), language="en", family="chatglm2"))
    assert "model.safetensors" in caught.value.en


@pytest.mark.parametrize("content", [None, "", "{", "[1]", json.dumps(BLOCK), json.dumps(FIRST)])
def test_what_cannot_be_told_passes(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    generations.check_folder(tmp_path)


PROFILE = choose(Hardware(ram_available=10**10, cores=2), ModelShape.from_config(BLOCK), Config())


@pytest.mark.parametrize(
    ("config", "files", "options", "title", "notes"),
    [
        (name("THUDM/chatglm2-6b"), {}, {}, "ChatGLM2", ()),
        ({}, {}, {}, "ChatGLM2", ("--family",)),
        ({}, {}, {"family": "chatglm2"}, "ChatGLM2", ()),
        ({}, {}, {"family": "codegeex2"}, "CodeGeeX2", ()),
        ({}, {"chat_template.jinja": "<|user|>"}, {}, "ChatGLM3", ()),
        (name("chatglm3") | {"pre_seq_len": 7}, {}, {}, "ChatGLM3", ("P-Tuning", "7")),
        (name("chatglm3") | {"pre_seq_len": 7}, {}, {"ptuning": Path("tuned")}, "ChatGLM3", ("P-Tuning", "tuned")),
    ],
    ids=str,
)
def test_the_generation_is_printed(tmp_path, config, files, options, title, notes):
    path = folder_with(tmp_path, "model", files | {"config.json": json.dumps(BLOCK | config)})
    zh, en = [], []
    print_choice(lambda *both: (zh.append(both[0]), en.append(both[1])), Config(**options), path, PROFILE)
    assert zh[0] == f"模型：{path}（{title}）" and en[0] == f"model: {path} ({title})"
    for said in (zh, en):
        assert len(said) == 3 + bool(notes) and all(part in said[1] for part in notes)


@pytest.mark.parametrize("named", ["chatglm", "chatglm2", "chatglm3", "codegeex2"])
@pytest.mark.parametrize(("config", "title"), [(BLOCK, "ChatGLM2"), (FIRST, "ChatGLM-6B")])
def test_a_family_that_contradicts_the_files_is_refused(tmp_path, config, title, named):
    """Network and tokenizer of ChatGLM-6B are its own; among the others the user may know better."""
    path = folder_with(tmp_path, "model", {"config.json": json.dumps(config)})
    if (named == "chatglm") == (title == "ChatGLM-6B"):
        generations.check_folder(path, named)
        return
    with pytest.raises(ModelError) as caught:
        prepare(Config(model=str(path), family=named))
    for text in (caught.value.zh, caught.value.en):
        assert title in text and f"--family {named}" in text and str(path) in text
    assert caught.value.param == "family"


def test_unknown_family_is_named():
    with pytest.raises(ModelError, match="chatglm2, chatglm3, codegeex2") as caught:
        find_family(BLOCK, OWN, "gpt")
    assert "gpt" in caught.value.zh and caught.value.param == "family"

"""Ids, pieces and texts of the official tokenizers, and what the official ones would stumble over."""

import json

import pytest

from server.errors import ModelError
from server.models.chatglm2.prompt import ChatGLM2, ChatGLM3
from tests.models.reference import DATA, TOKENIZERS
from tests.models.token_bytes import TEXTS, check_joined_bytes, check_token_bytes
from tests.oracle import ROOT, oracle_file

FAMILIES = [ChatGLM2(), ChatGLM3()]
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def tokenizers_of(folder):
    if not folder.exists():
        pytest.skip(f"no official tokenizer at {folder} (set DATA_DIR)")
    return {family.name: family.load_tokenizer(folder) for family in FAMILIES}


@pytest.fixture(scope="module")
def tokenizers():
    return tokenizers_of(DATA / "chatglm2-tokenizer")


@pytest.fixture(scope="module", params=["official", "tiny"])
def any_tokenizers(request):
    return tokenizers_of(DATA / "chatglm2-tokenizer" if request.param == "official" else TOKENIZERS)


def stored(name):
    return json.loads(oracle_file("tokenizer", name).read_text(encoding="utf-8"))


@by_family
def test_encodes_and_decodes_as_official(tokenizers, family):
    tokenizer = tokenizers[family.name]
    prefix = [tokenizer.special_ids["[gMASK]"], tokenizer.special_ids["sop"]]
    for case in stored("chatglm2_3_encode.json")["cases"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["name"]
        assert prefix + ids == case["ids_with_prefix"]
        assert tokenizer.pieces(case["text"]) == case["pieces"]
        assert tokenizer.decode(ids) == case["decode" if family.name == "chatglm2" else "decode_chatglm3"]
        assert tokenizer.decode(prefix + ids) == case[f"decode_with_prefix_{family.name}"]


@by_family
def test_decodes_any_ids_as_official(tokenizers, family):
    """Where the official code raises IndexError, what is no token gives no text: a server must go on."""
    tokenizer = tokenizers[family.name]
    for case in stored("chatglm2_3_decode_ids.json")[family.name]:
        if isinstance(case["decode"], str):
            assert tokenizer.decode(case["ids"]) == case["decode"], case["ids"]
        else:
            known = [i for i in case["ids"] if i < tokenizer.vocab_size]
            assert tokenizer.decode(case["ids"]) == tokenizer.decode(known)


@by_family
def test_decodes_every_prefix_as_official(tokenizers, family):
    for case in stored("chatglm2_3_stream.json")[family.name]:
        ids = case["ids"]
        decoded = [tokenizers[family.name].decode(ids[: n + 1]) for n in range(len(ids))]
        assert decoded == case["decode_prefixes"]


@by_family
def test_bytes_of_every_id(any_tokenizers, family):
    check_token_bytes(any_tokenizers[family.name])


@by_family
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_ids_are_the_text(any_tokenizers, family, text):
    data = check_joined_bytes(any_tokenizers[family.name], text)
    assert data == (b" " + text.encode() if text else b"")


def test_bytes_of_the_demo_models_tokenizer():
    tokenizer = ChatGLM2().load_tokenizer(ROOT / "THUDM" / "demo")
    check_token_bytes(tokenizer)
    for text in TEXTS:
        check_joined_bytes(tokenizer, text)


def test_bytes_of_parts_of_characters_and_special_tokens(tokenizers):
    assert [tokenizers["chatglm3"].token_bytes(i) for i in (3, 258, 13, 30910, 2, 0, 64790, 64795, 64798)] == [
        b"\x00", b"\xff", b"\n", b" ", b"", b"", b"[gMASK]", b"<|user|>", b"",
    ]  # fmt: skip
    assert tokenizers["chatglm2"].token_bytes(64790) == b""


@by_family
def test_special_tokens_stand_where_the_official_tokenizer_puts_them(tokenizers, family):
    tokenizer = tokenizers[family.name]
    assert family.encode(tokenizer, "你好") == [64790, 64792, 36474, 54591]
    assert family.encode(tokenizer, "") == [64790, 64792]
    for case in stored("chatglm2_3_encode.json")["cases"]:
        assert family.encode(tokenizer, case["text"]) == case["ids_with_prefix"]


@by_family
def test_special_tokens_are_not_parsed_out_of_text(any_tokenizers, family):
    tokenizer = any_tokenizers[family.name]
    text = "[gMASK]sop<|user|></s><|assistant|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & {*tokenizer.special_ids.values(), 0, 1, 2}
    assert tokenizer.decode(ids) == text


def test_ids_of_special_tokens(tokenizers):
    assert tokenizers["chatglm2"].vocab_size == 64794
    assert tokenizers["chatglm3"].special_ids == {
        "[MASK]": 64789,
        "[gMASK]": 64790,
        "[sMASK]": 64791,
        "sop": 64792,
        "eop": 64793,
        "<|system|>": 64794,
        "<|user|>": 64795,
        "<|assistant|>": 64796,
        "<|observation|>": 64797,
    }
    assert tokenizers["chatglm2"].eos_id == 2


@by_family
def test_half_a_surrogate_pair_is_read_as_a_replacement_character(any_tokenizers, family):
    tokenizer = any_tokenizers[family.name]
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.pieces("\ud83d\ude00") == tokenizer.pieces("😀")


@by_family
def test_negative_and_huge_ids_are_nothing(any_tokenizers, family):
    assert any_tokenizers[family.name].decode([-1, 10**9]) == ""


@by_family
def test_path_with_chinese_characters(tokenizers, family, tmp_path):
    folder = tmp_path / "模型 文件夹"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((DATA / "chatglm2-tokenizer" / "tokenizer.model").read_bytes())
    assert family.load_tokenizer(folder).encode("你好") == [36474, 54591]


@by_family
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:e7\n", "git-lfs"),
        (b"\x0a\x0e\x0a\x05garbage", "not a valid sentencepiece model"),
    ],
)
def test_damaged_file_is_named(family, content, said, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        family.load_tokenizer(tmp_path)
    assert str(path) in caught.value.en and str(path) in caught.value.zh
    assert said in caught.value.en

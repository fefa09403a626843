"""ChatGLM-6B's tokenizer, prompts and answers against the official ones; its network is checked in test_oracle."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.core import Message
from server.errors import BadRequest, ModelError
from server.kernels.torch_ops import TorchOps
from server.models.base import Context
from server.models.chatglm.prompt import ChatGLM
from server.models.families import find_family
from server.models.files import read_json
from server.models.loader import load_network
from tests.models.reference import DATA, TOKENIZERS
from tests.models.token_bytes import TEXTS, check_joined_bytes, check_token_bytes
from tests.oracle import oracle_file

FAMILY = ChatGLM()
CONFIG = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
    "bos_token_id": 130004,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
}


def tokenizer_of(folder):
    if not folder.exists():
        pytest.skip(f"no official tokenizer at {folder} (set DATA_DIR)")
    return FAMILY.load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(DATA / "chatglm-tokenizer")


@pytest.fixture(scope="module", params=["official", "tiny"])
def any_tokenizer(request):
    return tokenizer_of(DATA / "chatglm-tokenizer" if request.param == "official" else TOKENIZERS)


def stored(*parts):
    return json.loads(oracle_file(*parts).read_text(encoding="utf-8"))


# transformers parses these out of text, which a server should not: anybody could end an answer with them
FORGED = {"specials_text", "specials2"}


def test_encodes_and_decodes_as_official(tokenizer):
    for case in stored("tokenizer", "chatglm1_encode.json")["cases"]:
        ids = tokenizer.encode(case["text"])
        if case["name"] in FORGED:
            assert not {tokenizer.gmask_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
            continue
        assert ids == case["ids"], case["name"]
        assert tokenizer.pieces(case["text"]) == case["pieces"], case["name"]
        assert tokenizer.decode(ids) == case["decode"], case["name"]
        assert tokenizer.decode([*ids, 130001, 130004]) == case["decode_with_suffix"], case["name"]


def test_decodes_any_ids_as_official(tokenizer):
    for case in stored("tokenizer", "chatglm1_decode_ids.json")["chatglm1"]:
        expected = case["decode"] if isinstance(case["decode"], str) else ""
        assert tokenizer.decode(case["ids"]) == expected, case["ids"]
    assert tokenizer.decode([-1, 10**9]) == ""


def test_decodes_every_prefix_as_official(tokenizer):
    for case in stored("tokenizer", "chatglm1_stream.json")["chatglm1"]:
        ids = case["ids"]
        assert [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))] == case["decode_prefixes"]


def test_bytes_of_every_id(tokenizer):
    check_token_bytes(tokenizer)
    named = [4, 5, 0, 3, 2, 130001, 130005, 130008, 130009, 130087, 130088, 130343, 130344]
    spaces = [b" " * 2, b" " * 80]
    assert [tokenizer.token_bytes(i) for i in named] == [
        b"\n", b" ", " ⁇ ".encode(), b"", b"", b"", b"", b"\t", *spaces, b"\x00", b"\xff", b"",
    ]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_ids_are_the_text(any_tokenizer, text):
    check_joined_bytes(any_tokenizer, text)


def test_special_tokens_stand_where_the_official_tokenizer_puts_them(tokenizer):
    text = "如果给你一个机会，你会想逃离你所在的虚拟世界吗？"
    ids = [64245, 100562, 64804, 6, 66864, 64003, 76597, 63852, 73961, 69959, 64097, 63964, 31]
    assert FAMILY.encode(tokenizer, text) == [*ids, 130001, 130004]
    assert " ".join(tokenizer.pieces(text)) == "▁如果 给你一个 机会 , 你会 想 逃离 你 所在的 虚拟 世界 吗 ?"


def test_half_a_surrogate_pair(any_tokenizer):
    assert any_tokenizer.encode("a\ud83db") == any_tokenizer.encode("a\ufffdb")


@pytest.mark.parametrize(
    ("messages", "prefix", "text", "begun"),
    [
        ([Message("user", "你好")], "", "你好", ""),
        ([Message("user", "你好")], "作为", "你好", "作为"),
        ([Message("user", "a"), Message("assistant", "be")], "g", "a", "beg"),
        (
            [Message("system", "S。"), Message("user", "a"), Message("assistant", "b"), Message("user", "q")],
            "",
            "[Round 0]\n问：a\n答：b\n[Round 1]\n问：S。q\n答：",
            "",
        ),
    ],
)
def test_prompts(any_tokenizer, messages, prefix, text, begun):
    """As chat() of modeling_chatglm.py builds them; what the answer begins with stands behind <sop>."""
    start = [*any_tokenizer.encode(text), any_tokenizer.gmask_id, any_tokenizer.bos_id]
    assert FAMILY.build_prompt(any_tokenizer, messages, prefix) == start + any_tokenizer.encode(begun)


def test_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"ice_text\.model"):
        FAMILY.load_tokenizer(tmp_path)


def test_chat_as_official(tokenizer):
    for case in stored("chat", "chatglm1_chat.json")["cases"]:
        turns = [m for q, a in case["history"] for m in (Message("user", q), Message("assistant", a))]
        assert FAMILY.build_prompt(tokenizer, [*turns, Message("user", case["query"])]) == case["input_ids"]
        answer = [i for i in case["model_output_ids"] if i not in FAMILY.stop_ids(tokenizer)]
        shown = [""]
        for count in range(len(answer)):
            text = tokenizer.decode(answer[: count + 1])
            if not text.endswith("\ufffd"):
                shown.append(FAMILY.display(text, final=False))
        shown.append(FAMILY.display(tokenizer.decode(answer), final=True))
        assert all(after.startswith(before) for before, after in pairwise(shown))
        assert shown[-1] == case["chat_response"]


def test_process_response_as_official():
    for raw, expected in stored("chat", "process_response.json")["chatglm1"]:
        assert FAMILY.display(raw, final=True) == expected
        shown = [FAMILY.display(raw[:n], final=False) for n in range(len(raw) + 1)]
        assert all(after.startswith(before) for before, after in pairwise([*shown, expected]))


def test_answer_prefix_stands_behind_the_prompt(tokenizer):
    prompt = FAMILY.build_prompt(tokenizer, [Message("user", "你好")])
    assert prompt == [5, 74874, 130001, 130004]
    assert FAMILY.build_prompt(tokenizer, [Message("user", "你好")], "作为") == prompt + tokenizer.encode("作为")
    begun = [Message("user", "你好"), Message("assistant", "作")]
    assert FAMILY.build_prompt(tokenizer, begun, "为") == prompt + tokenizer.encode("作为")


def test_family_and_network_of_the_official_configuration():
    config = read_json(oracle_file("configs", "chatglm-6b.json"))
    family = find_family(config, oracle_file("configs"))
    assert (family.name, family.causal_prompt) == ("chatglm", False)
    network = family.build_network(config, TorchOps())
    assert network.kv_shape == (28, 32, 128) and network.max_positions == 2048
    # the official files have 13 tensors in each layer, one of them the rotary table's
    assert len(list(network.parameters())) == 28 * 12 + 4


@pytest.mark.parametrize(
    ("raw", "shown"),
    [("你好,", "你好"), ("hi,你", "hi，你"), ("a!b", "a!b"), ("你?a", "你？a"), ("你;好", "你；好"), ("a:", "a")],
)
def test_punctuation_beside_chinese_is_full_width_and_waits_at_the_end(raw, shown):
    assert FAMILY.display(raw, final=False) == shown


def test_punctuation_at_the_end_of_an_answer_stays():
    assert FAMILY.display("a,", final=True) == "a,"
    assert FAMILY.display("你,", final=True) == "你，"


@pytest.mark.parametrize(
    ("field", "value"),
    [("position_encoding_2d", False), ("vocab_size", "130528"), ("hidden_size", 4100)],
)
def test_impossible_value_is_named(field, value):
    with pytest.raises(ModelError, match=field):
        FAMILY.build_network({**CONFIG, field: value}, TorchOps())


def test_context_of_a_prompt():
    network = FAMILY.build_network(CONFIG, TorchOps())
    assert network.context([7, 8, 130001, 130004]) == Context(length=3, mask=2)
    assert network.context([130000, 7, 130004, 9]) == Context(length=2, mask=0)
    for ids in ([7, 8], [7, 130004], [130001, 7]):
        with pytest.raises(BadRequest) as caught:
            network.context(ids)
        assert caught.value.param == "prompt"
        for text in (caught.value.zh, caught.value.en):
            assert all(part in text for part in ("prompt ", "130001", "130000", "130004")) and "prompt_ids" not in text


def test_output_layer_is_the_embedding(tmp_path):
    """In memory once, and not missed in a file that leaves it out."""
    source = oracle_file("models", "glm1-a")
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config = read_json(source / "config.json")
    for bits in (16, 4):
        network, _ = load_network(
            tmp_path, config, FAMILY, dtype=torch.float32, device="cpu", bits=bits, ops=TorchOps()
        )
        shared = network.transformer.word_embeddings.weight
        assert torch.equal(shared, weights["transformer.word_embeddings.weight"])
        if bits == 16:
            assert network.lm_head.weight.data_ptr() == shared.data_ptr()
        else:
            assert network.lm_head.bits == bits

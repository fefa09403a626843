"""ChatGLM-6B as it was until April 2023: image tokens in front of the text's ids, and icetk's own ice_text.model."""

import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.core import GenerationRequest, Message, SamplingParams
from server.engine.local import EngineSettings, LocalEngine
from server.errors import BadRequest, ModelError
from server.kernels.torch_ops import TorchOps
from server.models.base import Context
from server.models.chatglm.prompt import ChatGLM
from server.models.chatglm.tokenizer import ChatGLMTokenizer
from server.models.files import read_json
from server.models.loader import load_model
from tests.models.reference import DATA, OWN, TOKENIZERS
from tests.models.token_bytes import TEXTS, check_token_bytes
from tests.oracle import ROOT, oracle_file

FAMILY = ChatGLM()
IMAGES = 20
BYTE_FALLBACK = b"\x98\x02\x01"  # field 35 of trainer_spec, true


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def fields(model: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of every field of a ModelProto, which are all messages."""
    at = 0
    while at < len(model):
        key, at = varint(model, at)
        length, at = varint(model, at)
        yield key >> 3, model[at : at + length]
        at += length


def message(number: int, content: bytes) -> bytes:
    size, length = bytearray(), len(content)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + content


def first_release(model: bytes) -> bytes:
    """The file as icetk has it: without the pieces from [MASK] on, and without byte fallback."""
    pieces = [content for number, content in fields(model) if number == 1]
    text = next(i for i, piece in enumerate(pieces) if b"[MASK]" in piece)
    others = [(n, content.replace(BYTE_FALLBACK, b"") if n == 2 else content) for n, content in fields(model) if n != 1]
    assert others != [field for field in fields(model) if field[0] != 1]
    return b"".join(message(1, piece) for piece in pieces[:text]) + b"".join(message(*other) for other in others)


@pytest.fixture(scope="module", params=["genuine", "tiny"])
def folder(request):
    found = DATA / "chatglm-tokenizer" if request.param == "genuine" else TOKENIZERS
    if not (found / "ice_text.model").exists():
        pytest.skip(f"no official tokenizer at {found} (set DATA_DIR)")
    return found


@pytest.fixture(scope="module")
def genuine(folder):
    return FAMILY.load_tokenizer(folder)


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    """Loaded from icetk's file."""
    path = tmp_path_factory.mktemp("icetk") / "ice_text.model"
    path.write_bytes(first_release((folder / "ice_text.model").read_bytes()))
    return ChatGLMTokenizer.load(path)


def many_texts():
    yield from TEXTS
    yield from ("[gMASK]<sop><eop>", "<n><|tab|><|blank_3|>", "ﬁ ² Ａ１ 㐀 \u200b", "\t\t  x\n\n\n", "𠮷𠮷" * 20)
    for path in (ROOT / "README.md", ROOT / "docs" / "architecture.md", *(ROOT / "tools").glob("*.py")):
        yield from path.read_text(encoding="utf-8").split("\n\n")
    if (cases := DATA.parent / "oracle" / "tokenizer" / "chatglm1_encode.json").exists():
        yield from (case["text"] for case in json.loads(cases.read_text(encoding="utf-8"))["cases"])


def test_the_first_file_becomes_the_later_one(first, genuine):
    assert (first.vocab_size, first.gmask_id, first.eos_id) == (genuine.vocab_size, genuine.gmask_id, genuine.eos_id)
    count = 0
    for text in many_texts():
        ids = genuine.encode(text)
        assert first.encode(text) == ids and first.pieces(text) == genuine.pieces(text), text
        assert first.decode(ids) == genuine.decode(ids), text
        count += 1
    assert count > 100
    ids = range(0, genuine.vocab_size, 1 + genuine.vocab_size // 5000)
    assert [first.token_bytes(i) for i in ids] == [genuine.token_bytes(i) for i in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_stand_behind_the_image_tokens(folder, genuine, text):
    early = ChatGLMTokenizer.load(folder / "ice_text.model", genuine.bos_id + 20000)
    assert early.encode(text) == [20000 + i for i in genuine.encode(text)]
    assert early.pieces(text) == genuine.pieces(text)
    assert early.decode(early.encode(text)) == genuine.decode(genuine.encode(text))
    images = [0, 5, 19999]
    assert early.decode([*images, *early.encode(text), *images]) == genuine.decode(genuine.encode(text))
    assert [early.token_bytes(i) for i in images] == [b""] * 3
    assert FAMILY.stop_ids(early) == {genuine.eos_id + 20000}
    assert early.vocab_size == genuine.vocab_size + 20000


def test_official_ids_of_the_early_release():
    """GLM-API's users know these: 150001 150004 at the end of every prompt."""
    path = DATA / "chatglm-tokenizer" / "ice_text.model"
    if not path.exists():
        pytest.skip(f"no official tokenizer at {path} (set DATA_DIR)")
    early = ChatGLMTokenizer.load(path, 150004)
    assert FAMILY.build_prompt(early, [Message("user", "你好")]) == [20005, 94874, 150001, 150004]
    assert (FAMILY.stop_ids(early), early.vocab_size) == ({150005}, 150344)


def test_bytes_of_every_id():
    tiny = ChatGLMTokenizer.load(TOKENIZERS / "ice_text.model")
    check_token_bytes(ChatGLMTokenizer.load(TOKENIZERS / "ice_text.model", tiny.bos_id + IMAGES))


def test_config_of_the_early_release():
    """It names no mask tokens; the official code had their ids as constants."""
    config = {
        "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "inner_hidden_size": 16384,
        "vocab_size": 150528, "max_sequence_length": 2048, "bos_token_id": 150004, "eos_token_id": 150005,
        "layernorm_epsilon": 1e-5, "position_encoding_2d": True, "model_type": "chatglm",
    }  # fmt: skip
    network = FAMILY.build_network(config, TorchOps())
    assert network.vocab_size == 150528
    assert network.context([20005, 150001, 150004]) == Context(length=2, mask=1)
    assert network.context([150000, 20005, 150004]) == Context(length=2, mask=0)
    with pytest.raises(BadRequest):
        network.context([20005, 130001, 130004])


def early_folder(path, file: bytes):
    """small-chatglm with image tokens' rows in front, its config as it was then, and ``file`` as its tokenizer."""
    path.mkdir()
    source = OWN / "small-chatglm"
    config = read_json(source / "config.json")
    early = {k: v for k, v in config.items() if k not in ("mask_token_id", "gmask_token_id")}
    early |= {name: early[name] + IMAGES for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    (path / "config.json").write_text(json.dumps(early), encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        weights[name] = torch.cat([torch.zeros_like(weights[name][:IMAGES]), weights[name]])
    save_file(weights, path / "model.safetensors")
    (path / "ice_text.model").write_bytes(file)
    return path


def answer(folder):
    model = load_model(folder, dtype=torch.float32, device="cpu", ops=TorchOps())
    engine = LocalEngine(model, EngineSettings(max_length=64, slots=1, queue=0))
    messages = (Message("user", "你是谁？"), Message("assistant", "我不知道。"), Message("user", "你好"))
    request = GenerationRequest(messages=messages, params=SamplingParams(temperature=0, max_tokens=20))
    try:
        stream = engine.submit(request)
        outputs = list(stream)
    finally:
        engine.close(10)
    return stream.prompt_ids, [i for o in outputs for i in o.token_ids], "".join(o.text for o in outputs)


@pytest.mark.parametrize("kind", ["early code", "icetk's file"])
def test_an_early_folder_answers_as_the_later_one(tmp_path, kind):
    file = (TOKENIZERS / "ice_text.model").read_bytes()
    later = tmp_path / "later"
    shutil.copytree(OWN / "small-chatglm", later)
    (later / "ice_text.model").write_bytes(file)
    early = early_folder(tmp_path / "early", file if kind == "early code" else first_release(file))
    prompt, ids, text = answer(later)
    early_prompt, early_ids, early_text = answer(early)
    assert early_prompt == tuple(i + IMAGES for i in prompt)
    assert (early_ids, early_text) == ([i + IMAGES for i in ids], text)
    assert len(ids) > 1


@pytest.mark.parametrize(
    ("bos_id", "file", "said"),
    [(3, "ice_text.model", "bos_token_id"), (None, "tokenizer.model", "no <n>")],
)
def test_files_of_different_models_are_named(tmp_path, bos_id, file, said):
    path = tmp_path / "ice_text.model"
    path.write_bytes((TOKENIZERS / file).read_bytes())
    with pytest.raises(ModelError, match=said) as caught:
        ChatGLMTokenizer.load(path, bos_id)
    assert str(path) in caught.value.zh


def test_the_official_configuration_has_no_image_tokens(tmp_path):
    shutil.copy(oracle_file("configs", "chatglm-6b.json"), tmp_path / "config.json")
    source = DATA / "chatglm-tokenizer" / "ice_text.model"
    if not source.exists():
        pytest.skip(f"no official tokenizer at {source} (set DATA_DIR)")
    shutil.copy(source, tmp_path / "ice_text.model")
    assert FAMILY.load_tokenizer(tmp_path).bos_id == 130004

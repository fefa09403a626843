"""ChatGLM-6B's embedding and output layer: one matrix, in 16 bits or as codes, under both names or under one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from server.errors import ModelError
from server.models.chatglm.prompt import ChatGLM
from server.quant.linear import QuantEmbedding, QuantLinear
from tests.models.plain_checkpoints import (
    CONFIGS,
    assert_same_answers,
    load_ours,
    random_network,
    tensors_of,
    write_checkpoint,
)
from tools.official_packing import SHARED, pack_checkpoint, unpack_checkpoint

EMBEDDING, OUTPUT = SHARED
KEPT = {"both": SHARED, "embedding": (EMBEDDING,), "output": (OUTPUT,)}


def chatglm6b_int4_qe(folder, bits, names=SHARED):
    """A folder like THUDM/chatglm-6b-int4-qe, its shared pair under these names, and a network with its values."""
    judge = random_network("chatglm")
    packed = pack_checkpoint({n: t.half() for n, t in tensors_of(judge).items()}, bits, embeddings=True)
    judge.load_state_dict(unpack_checkpoint(packed, bits))
    dropped = set(SHARED) - set(names)
    kept = {name: tensor.clone() for name, tensor in packed.items() if name.removesuffix("_scale") not in dropped}
    config = {**CONFIGS["chatglm"], "quantization_bit": bits, "quantization_embeddings": True}
    return write_checkpoint(folder, kept, config), judge


@pytest.mark.parametrize("names", KEPT)
@pytest.mark.parametrize("bits", [4, 8])
def test_results_are_the_official_ones(tmp_path, bits, names):
    folder, judge = chatglm6b_int4_qe(tmp_path, bits, KEPT[names])
    for loaded in (load_ours(folder, "chatglm", bits=bits), load_ours(folder, "chatglm")):
        assert_same_answers(loaded, judge, "chatglm")


@pytest.mark.parametrize(("stored", "bits"), [(4, 4), (4, 8), (8, 8)])
def test_codes_are_kept_and_shared(tmp_path, stored, bits):
    network = load_ours(chatglm6b_int4_qe(tmp_path, stored)[0], "chatglm", bits=bits).network
    embedding, output = network.transformer.word_embeddings, network.lm_head
    assert isinstance(embedding, QuantEmbedding) and isinstance(output, QuantLinear)
    assert (embedding.bits, output.bits) == (stored, stored)
    assert embedding._weight.codes.data_ptr() == output.weight.codes.data_ptr()


def test_fewer_bits_than_are_stored(tmp_path):
    """The output layer is quantized again like every linear layer; embeddings are not quantized by us."""
    network = load_ours(chatglm6b_int4_qe(tmp_path, 8)[0], "chatglm", bits=4).network
    assert isinstance(network.transformer.word_embeddings, torch.nn.Embedding) and network.lm_head.bits == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_come_in_the_networks_dtype(tmp_path, dtype):
    folder, judge = chatglm6b_int4_qe(tmp_path, 4)
    network = load_ours(folder, "chatglm", bits=4, dtype=dtype).network
    rows = network.transformer.word_embeddings(torch.tensor([5, 0, 5]))
    assert torch.equal(rows, judge.transformer.word_embeddings.weight[[5, 0, 5]].to(dtype))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["lm_head", "word_embeddings"])
def test_adapter_on_one_of_the_two(tmp_path, target):
    folder, judge = chatglm6b_int4_qe(tmp_path / "base", 4)
    adapted = get_peft_model(judge, LoraConfig(target_modules=[target], r=3)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    assert_same_answers(load_ours(folder, "chatglm", lora=tmp_path / "lora"), adapted, "chatglm")
    network = load_ours(folder, "chatglm", lora=tmp_path / "lora", bits=4).network
    embedding, output = network.transformer.word_embeddings._weight, network.lm_head.weight
    # the one that was quantized again has our groups: the other one keeps its single scale for a row
    row = embedding.in_features
    assert (embedding.group_size, output.group_size) == ((row, 64) if target == "lm_head" else (64, row))


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("names", KEPT)
def test_sixteen_bit_files(tmp_path, names, bits):
    """transformers' own save_pretrained stores tied matrices under one name; files in 16 bits have both."""
    judge = random_network("chatglm")
    tensors = {n: t for n, t in tensors_of(judge).items() if n not in SHARED or n in KEPT[names]}
    folder = write_checkpoint(tmp_path, tensors, CONFIGS["chatglm"])
    network = load_ours(folder, "chatglm", bits=bits).network
    if bits == 16:
        assert_same_answers(load_ours(folder, "chatglm"), judge, "chatglm")
        assert network.lm_head.weight.data_ptr() == network.transformer.word_embeddings.weight.data_ptr()
    else:
        assert network.lm_head.bits == 4
        assert torch.equal(network.transformer.word_embeddings.weight, judge.lm_head.weight)


@pytest.mark.parametrize("order", [SHARED, SHARED[::-1]])
def test_the_embedding_counts_where_the_two_differ(tmp_path, order):
    judge = random_network("chatglm")
    tensors = tensors_of(judge)
    values = {EMBEDDING: tensors[EMBEDDING], OUTPUT: tensors[OUTPUT] + 1}
    ordered = {**{n: t for n, t in tensors.items() if n not in SHARED}, **{n: values[n] for n in order}}
    folder = write_checkpoint(tmp_path, tensors, CONFIGS["chatglm"])
    (folder / "model.safetensors").unlink()
    torch.save(ordered, folder / "pytorch_model.bin")
    assert_same_answers(load_ours(folder, "chatglm"), judge, "chatglm")
    network = load_ours(folder, "chatglm", bits=8).network
    assert isinstance(network.lm_head, QuantLinear)
    difference = network.lm_head(torch.eye(48)).T - tensors[EMBEDDING]
    assert difference.abs().max() < 0.02


def test_scale_without_codes(tmp_path):
    folder, _ = chatglm6b_int4_qe(tmp_path, 4, (OUTPUT,))
    tensors = load_file(folder / "model.safetensors")
    del tensors[OUTPUT]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=EMBEDDING):
        load_ours(folder, "chatglm", bits=4)


def test_the_family_takes_such_a_configuration():
    config = {**CONFIGS["chatglm"], "quantization_bit": 4, "quantization_embeddings": True}
    assert ChatGLM().build_network(config, None).vocab_size == 90

"""P-tuning v2: a prefix beside any base, of any generation, gives what the independent network gives."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from server.errors import ModelError
from tests.models.plain_checkpoints import (
    CONFIGS,
    assert_same_answers,
    load_ours,
    our_logits,
    prompt,
    random_network,
    tensors_of,
    write_checkpoint,
)
from tools.official_packing import pack_checkpoint, unpack_checkpoint

PREFIX = "transformer.prefix_encoder."
FAMILIES = sorted(CONFIGS)


class Tuned:
    """A base model's folder, a P-tuning checkpoint's folder, and the network that has both."""

    def __init__(self, root, family, *, tokens=5, projected=False):
        self.family = family
        self.fields = {"pre_seq_len": tokens, "prefix_projection": projected}
        self.judge = random_network(family, **self.fields)
        tensors = tensors_of(self.judge)
        self.prefix = {n: t for n, t in tensors.items() if n.startswith(PREFIX)}
        self.weights = {n: t for n, t in tensors.items() if n not in self.prefix}
        self.base = write_checkpoint(root / "base", self.weights, CONFIGS[family])
        self.folder = write_checkpoint(root / "ptuning", self.prefix, {**CONFIGS[family], **self.fields})

    def load(self, *, folder=None, **options):
        return load_ours(folder or self.base, self.family, **{"ptuning": self.folder, **options})

    def refused(self, **options) -> ModelError:
        with pytest.raises(ModelError) as caught:
            self.load(**options)
        for sentence in (caught.value.zh, caught.value.en):
            assert "\n" not in sentence
        return caught.value


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_beside_the_base(tmp_path, family, projected, caplog):
    tuned = Tuned(tmp_path, family, projected=projected)
    with caplog.at_level(logging.INFO):
        assert_same_answers(tuned.load(), tuned.judge, family)
    assert f"5 prefix tokens, {tuned.folder}" in caplog.text
    plain = load_ours(tuned.base, family)
    assert plain.prefix is None
    assert not torch.allclose(our_logits(plain, prompt(family)), our_logits(tuned.load(), prompt(family)), atol=0.1)


def test_the_official_scripts_file(tmp_path):
    """pytorch_model.bin with the prefix alone, in float16 as some scripts save it, and no config.json."""
    tuned = Tuned(tmp_path, "chatglm2")
    folder = tmp_path / "checkpoint-3000"
    folder.mkdir()
    half = {name: tensor.half() for name, tensor in tuned.prefix.items()}
    torch.save(half, folder / "pytorch_model.bin")
    tuned.judge.load_state_dict({**tensors_of(tuned.judge), **{n: t.float() for n, t in half.items()}})
    assert_same_answers(tuned.load(ptuning=folder), tuned.judge, "chatglm2")


@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_names_without_their_beginning(tmp_path, family):
    tuned = Tuned(tmp_path, family, projected=True)
    short = {name.removeprefix(PREFIX): tensor for name, tensor in tuned.prefix.items()}
    folder = write_checkpoint(tmp_path / "short", short, tuned.fields)
    assert_same_answers(tuned.load(ptuning=folder), tuned.judge, family)


def test_other_tensors_are_ignored_with_a_warning(tmp_path, caplog):
    tuned = Tuned(tmp_path, "chatglm2")
    save_file({**tuned.prefix, "value_head.weight": torch.ones(2)}, tuned.folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_same_answers(tuned.load(), tuned.judge, "chatglm2")
    assert "ignored 1 unknown" in caplog.text and "value_head.weight" in caplog.text


def test_it_replaces_the_prefix_of_the_base(tmp_path):
    """A base folder with a prefix of its own, of another length."""
    tuned = Tuned(tmp_path, "chatglm", projected=True)
    other = random_network("chatglm", seed=1, pre_seq_len=2)
    own = {n: t for n, t in tensors_of(other).items() if n.startswith(PREFIX)}
    write_checkpoint(tuned.base, {**tuned.weights, **own}, {**CONFIGS["chatglm"], "pre_seq_len": 2})
    assert tuned.load(ptuning=None).prefix[0].shape[1] == 2
    assert_same_answers(tuned.load(), tuned.judge, "chatglm")


def test_base_whose_config_promises_a_prefix(tmp_path):
    """As the official documentation asks: pre_seq_len is put into the base model's config.json."""
    tuned = Tuned(tmp_path, "chatglm2")
    write_checkpoint(tuned.base, tuned.weights, {**CONFIGS["chatglm2"], **tuned.fields})
    assert_same_answers(tuned.load(), tuned.judge, "chatglm2")
    error = tuned.refused(ptuning=None)
    for sentence in (error.zh, error.en):
        assert "--ptuning" in sentence and PREFIX + "embedding.weight" in sentence and str(tuned.base) in sentence


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_given_as_the_model(tmp_path, family):
    tuned = Tuned(tmp_path, family)
    error = tuned.refused(ptuning=None, folder=tuned.folder)
    for sentence in (error.zh, error.en):
        assert f"--ptuning {tuned.folder}" in sentence and "--model" in sentence


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_official_quantized_base(tmp_path, family, bits):
    tuned = Tuned(tmp_path, family, projected=True)
    packed = pack_checkpoint({n: t.half() for n, t in tuned.weights.items()}, bits)
    write_checkpoint(tuned.base, packed, {**CONFIGS[family], "quantization_bit": bits})
    tuned.judge.load_state_dict({**unpack_checkpoint(packed, bits), **tuned.prefix})
    assert_same_answers(tuned.load(bits=bits), tuned.judge, family)


@pytest.mark.parametrize("bits", [4, 8])
def test_base_quantized_while_it_is_read(tmp_path, bits):
    tuned = Tuned(tmp_path, "chatglm3")
    loaded = tuned.load(bits=bits)
    judge = random_network("chatglm3", **tuned.fields)
    quantized = load_ours(tuned.base, "chatglm3", bits=bits).network
    with torch.no_grad():
        for name, module in judge.named_modules():
            if isinstance(module, torch.nn.Linear) and "prefix" not in name:
                columns = torch.eye(module.in_features)
                ours = quantized.get_submodule(name)
                zero = 0 if ours.bias is None else ours.bias
                module.weight.copy_((ours(columns) - zero).T)
    assert_same_answers(loaded, judge, "chatglm3")


def test_the_prefix_has_the_networks_dtype(tmp_path):
    keys, values = Tuned(tmp_path, "chatglm2").load(dtype=torch.bfloat16).prefix
    assert keys.dtype == values.dtype == torch.bfloat16


def change(tuned, tensors):
    save_file(tensors, tuned.folder / "model.safetensors")


def test_no_prefix_at_all(tmp_path):
    tuned = Tuned(tmp_path, "chatglm2")
    change(tuned, {"value_head.weight": torch.ones(2)})
    error = tuned.refused()
    for sentence in (error.zh, error.en):
        assert str(tuned.folder) in sentence and PREFIX in sentence and "--ptuning" in sentence


@pytest.mark.parametrize("lost", ["embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight"])
def test_part_of_a_prefix(tmp_path, lost):
    tuned = Tuned(tmp_path, "chatglm", projected=True)
    change(tuned, {n: t for n, t in tuned.prefix.items() if n != PREFIX + lost})
    assert PREFIX + lost in tuned.refused().en


def test_projection_that_the_configuration_asks_for(tmp_path):
    """The embedding of a ChatGLM2 has the same shape with projection and without."""
    tuned = Tuned(tmp_path, "chatglm2", projected=True)
    change(tuned, {PREFIX + "embedding.weight": tuned.prefix[PREFIX + "embedding.weight"]})
    assert PREFIX + "trans.0.weight" in tuned.refused().en


def test_tensors_that_p_tuning_v2_does_not_have(tmp_path):
    tuned = Tuned(tmp_path, "chatglm2")
    change(tuned, {**tuned.prefix, PREFIX + "gate.weight": torch.ones(2)})
    assert PREFIX + "gate.weight" in tuned.refused().en


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_of_another_model(tmp_path, projected):
    tuned = Tuned(tmp_path, "chatglm2", projected=projected)
    other = Tuned(tmp_path / "other", "chatglm", projected=projected)
    error = tuned.refused(ptuning=other.folder)
    assert "144" in error.en and "288" in error.en and str(other.folder) in error.zh


@pytest.mark.parametrize("name", ["embedding.weight", "trans.0.weight", "trans.2.bias"])
def test_shapes_that_do_not_fit_each_other(tmp_path, name):
    tuned = Tuned(tmp_path, "chatglm2", projected=True)
    change(tuned, {**tuned.prefix, PREFIX + name: torch.ones(3)})
    error = tuned.refused()
    assert f"{name} [3]" in error.en and f"{name} [3]" in error.zh


def test_damaged_configuration_beside_the_prefix(tmp_path):
    tuned = Tuned(tmp_path, "chatglm2")
    path = tuned.folder / "config.json"
    path.write_text(json.dumps(tuned.fields)[:-3], encoding="utf-8")
    assert str(path) in tuned.refused().en

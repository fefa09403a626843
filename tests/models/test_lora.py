"""LoRA adapters made and saved by the real peft: ours gives what peft gives, or refuses the adapter."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from server.errors import ModelError
from server.kernels.quantize import quantize
from server.kernels.torch_ops import dequantize
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

FAMILIES = sorted(CONFIGS)
QKV = "query_key_value"
ALL = [QKV, "dense", "dense_h_to_4h", "dense_4h_to_h"]
FIRST_QKV = "transformer.encoder.layers.0.self_attention.query_key_value"
# name -> (family, fields of the adapter's configuration)
KINDS = {
    "rank-stabilized": ("chatglm2", {"target_modules": ALL, "r": 6, "use_rslora": True}),
    "patterns": (
        "chatglm3",
        {
            "target_modules": ALL,
            "rank_pattern": {"dense": 2, r"layers\.[12]\.mlp\.dense_h_to_4h": 7, QKV: 1},
            "alpha_pattern": {"layers.0.mlp.dense_4h_to_h": 3, r".*\.2\..*query_key_value": 40},
        },
    ),
    "patterns-chatglm": (
        "chatglm",
        {"target_modules": ALL, "rank_pattern": {"dense": 2}, "alpha_pattern": {r"1\.attention\.dense": 50}},
    ),
    "bias-all": ("chatglm", {"target_modules": [QKV], "bias": "all"}),
    "bias-all-chatglm2": ("chatglm2", {"target_modules": ["dense"], "bias": "all"}),
    "bias-lora-only": ("chatglm", {"target_modules": ["dense", "dense_4h_to_h"], "bias": "lora_only"}),
    "modules-to-save": ("chatglm2", {"target_modules": [QKV], "modules_to_save": ["output_layer", "final_layernorm"]}),
    "modules-to-save-chatglm": ("chatglm", {"target_modules": [QKV], "modules_to_save": ["lm_head"]}),
    "embedding": ("chatglm2", {"target_modules": ["word_embeddings", "output_layer", QKV]}),
    "embedding-chatglm": ("chatglm", {"target_modules": ["word_embeddings", QKV]}),
    "output-chatglm": ("chatglm", {"target_modules": ["lm_head"]}),
    "both-tied-chatglm": ("chatglm", {"target_modules": ["word_embeddings", "lm_head"]}),
    "dora": ("chatglm2", {"target_modules": ALL, "use_dora": True}),
    "dora-chatglm": ("chatglm", {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "regular-expression": ("codegeex2", {"target_modules": r".*layers\.[02]\..*dense(_h_to_4h)?"}),
    "all-linear": ("chatglm2", {"target_modules": "all-linear"}),
    "some-layers": ("chatglm2", {"target_modules": ALL, "layers_to_transform": [0, 2]}),
    "not-all-modules": ("chatglm3", {"target_modules": ALL, "exclude_modules": ["self_attention.dense"]}),
}


class Adapted:
    """A base folder and an adapter that peft made for it; ``judge`` is peft's model in memory."""

    def __init__(self, root, family, fields, *, safetensors=True):
        self.family = family
        self.base_network = random_network(family)
        self.weights = tensors_of(self.base_network)
        self.base = write_checkpoint(root / "base", self.weights, CONFIGS[family])
        self.judge = get_peft_model(
            random_network(family), LoraConfig(**{"r": 4, "lora_alpha": 10, "lora_dropout": 0.1, **fields})
        ).eval()
        with torch.no_grad():
            for parameter in self.judge.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.folder = root / "adapter"
        self.judge.save_pretrained(self.folder, safe_serialization=safetensors)

    def load(self, **options):
        return load_ours(self.base, self.family, **{"lora": self.folder, **options})

    def refused(self, *parts, **options) -> ModelError:
        with pytest.raises(ModelError) as caught:
            self.load(**options)
        for sentence in (caught.value.zh, caught.value.en):
            assert "\n" not in sentence
            for part in parts:
                assert str(part) in sentence, sentence
        return caught.value

    @property
    def file(self):
        return self.folder / "adapter_model.safetensors"

    def change(self, **fields):
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")

    def rewrite(self, tensors):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_generation(tmp_path, family, safetensors, caplog):
    adapted = Adapted(tmp_path, family, {"target_modules": ALL}, safetensors=safetensors)
    with caplog.at_level(logging.INFO):
        loaded = adapted.load()
    assert_same_answers(loaded, adapted.judge, family)
    file = adapted.folder / ("adapter_model.safetensors" if safetensors else "adapter_model.bin")
    assert f"12 matrices changed (rank 4), 0 tensors replaced, {file}" in caplog.text
    without = our_logits(load_ours(adapted.base, family), prompt(family))
    assert not torch.allclose(without, our_logits(loaded, prompt(family)), atol=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path, kind):
    family, fields = KINDS[kind]
    adapted = Adapted(tmp_path, family, fields)
    assert_same_answers(adapted.load(), adapted.judge, family)
    # peft, too, finds everything in the files that it wrote
    again = PeftModel.from_pretrained(random_network(family), adapted.folder).eval()
    assert_same_answers(adapted.load(), again, family)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_before_it_is_cast(tmp_path, dtype):
    """A half-precision base: the sum is rounded once."""
    adapted = Adapted(tmp_path, "chatglm2", {"target_modules": ALL})
    half = {name: tensor.half() for name, tensor in adapted.weights.items()}
    write_checkpoint(adapted.base, half, CONFIGS["chatglm2"])
    judge = random_network("chatglm2")
    judge.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    expected = tensors_of(PeftModel.from_pretrained(judge, adapted.folder).merge_and_unload())
    for name, tensor in adapted.load(dtype=dtype).network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(dtype), atol=1e-7, rtol=torch.finfo(dtype).eps)
        assert (tensor == expected[name].to(dtype)).float().mean() > 0.999


def stored_matrix(module):
    """What a quantized layer multiplies with."""
    return dequantize(module.weight, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_merged_then_quantized(tmp_path, family, bits):
    adapted = Adapted(tmp_path, family, {"target_modules": ALL, "bias": "all"})
    merged = write_checkpoint(tmp_path / "merged", tensors_of(adapted.judge.merge_and_unload()), CONFIGS[family])
    expected, actual = load_ours(merged, family, bits=bits).network, adapted.load(bits=bits).network
    compared = 0
    for name, module in expected.named_modules():
        if hasattr(module, "bits"):
            compared += 1
            ours, theirs = stored_matrix(actual.get_submodule(name)), stored_matrix(module)
            # the last bit of a sum may decide between two codes, or two scales
            assert ((ours - theirs).abs() < 1e-3 * theirs.abs().amax()).float().mean() > 0.99, name
            assert (ours - theirs).abs().mean() < 1e-3 * theirs.abs().mean(), name
    assert compared == 4 * 3 + 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_official_quantized_base(tmp_path, family, stored):
    """Unpacked, merged, and quantized again in as many bits; what the adapter leaves alone keeps its codes."""
    adapted = Adapted(tmp_path, family, {"target_modules": [QKV, "dense"]})
    packed = pack_checkpoint({name: tensor.half() for name, tensor in adapted.weights.items()}, stored)
    write_checkpoint(adapted.base, packed, {**CONFIGS[family], "quantization_bit": stored})
    judge = random_network(family)
    judge.load_state_dict(unpack_checkpoint(packed, stored))
    judge = PeftModel.from_pretrained(judge, adapted.folder).eval()
    assert_same_answers(adapted.load(), judge, family)
    merged = judge.merge_and_unload()
    network, untouched = adapted.load(bits=stored).network, load_ours(adapted.base, family, bits=stored).network
    for name, module in network.named_modules():
        if name.endswith((".query_key_value", ".dense")):
            theirs = dequantize(quantize(merged.get_submodule(name).weight.detach(), stored), torch.float32)
            assert module.bits == stored
            assert (stored_matrix(module) - theirs).abs().mean() < 1e-3 * theirs.abs().mean(), name
        elif hasattr(module, "bits"):
            assert torch.equal(stored_matrix(module), stored_matrix(untouched.get_submodule(name))), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["chatglm", "chatglm3"])
def test_together_with_p_tuning(tmp_path, family):
    adapted = Adapted(tmp_path, family, {"target_modules": ALL})
    fields = {"pre_seq_len": 4, "prefix_projection": True}
    tuned = random_network(family, **fields)
    prefix = {n: t for n, t in tensors_of(tuned).items() if "prefix_encoder" in n}
    ptuning = write_checkpoint(tmp_path / "ptuning", prefix, fields)
    tuned.load_state_dict({**adapted.weights, **prefix})
    judge = PeftModel.from_pretrained(tuned, adapted.folder).eval()
    assert_same_answers(adapted.load(ptuning=ptuning), judge, family)


@pytest.mark.filterwarnings("ignore")
def test_tied_layers_stay_one_matrix_until_an_adapter_changes_one(tmp_path):
    adapted = Adapted(tmp_path, "chatglm", {"target_modules": [QKV]})
    network = adapted.load().network
    assert network.lm_head.weight.data_ptr() == network.transformer.word_embeddings.weight.data_ptr()


@pytest.fixture
def adapted(tmp_path):
    return Adapted(tmp_path, "chatglm2", {"target_modules": ALL})


UNFIT = {
    "peft_type": "LOHA",
    "fan_in_fan_out": True,
    "enable_lora": [True, False, True],  # peft 0.2's fused matrices
    "layer_replication": [[0, 2], [1, 3]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["weight"],
    "lora_bias": True,
    "alora_invocation_tokens": [1],
    "a_field_of_tomorrow": {"x": 1},
    "init_lora_weights": "pissa_niter_16",
    "bias": "some",
    "r": 0,
    "lora_alpha": "16",
    "rank_pattern": {"dense": 2.5},
    "alpha_pattern": {"dense[": 2},
}


@pytest.mark.parametrize("name", UNFIT)
def test_configuration_that_cannot_be_merged_exactly(adapted, name):
    adapted.change(**{name: UNFIT[name]})
    adapted.refused(adapted.folder / "adapter_config.json", name)


def test_fields_without_effect(adapted):
    adapted.change(enable_lora=None, merge_weights=False, loftq_config={}, megatron_core="megatron.core", eva_config={})
    assert_same_answers(adapted.load(), adapted.judge, "chatglm2")


@pytest.mark.parametrize("extra", ["base_model.model.score.weight", f"base_model.model.{FIRST_QKV}.hada_w1_a",
                                   "base_model.model.transformer.embedding.word_embeddings.lora_A.weight"])
def test_tensor_without_a_place(adapted, extra):
    adapted.rewrite({**load_file(adapted.file), extra: torch.ones(4, 4)})
    adapted.refused(adapted.file, extra)


def test_adapter_of_another_generation(adapted, tmp_path):
    other = Adapted(tmp_path / "other", "chatglm", {"target_modules": ALL})
    adapted.refused(other.file, "base_model.model.transformer.layers.0.", lora=other.folder)


@pytest.mark.parametrize("end", ["lora_A.weight", "lora_B.weight"])
def test_part_of_an_adapter(adapted, end):
    tensors = load_file(adapted.file)
    del tensors[f"base_model.model.{FIRST_QKV}.{end}"]
    adapted.rewrite(tensors)
    adapted.refused(adapted.file, f"{FIRST_QKV}.{end}")


@pytest.mark.parametrize("targets", [ALL, r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)"])
def test_layer_that_the_file_lacks(adapted, targets):
    adapted.change(target_modules=targets)
    adapted.rewrite({n: t for n, t in load_file(adapted.file).items() if ".layers.1." not in n})
    adapted.refused(adapted.file, "transformer.encoder.layers.1.self_attention.query_key_value.lora_A.weight")


def test_magnitude_without_dora(tmp_path):
    adapted = Adapted(tmp_path, "chatglm2", {"target_modules": [QKV], "use_dora": True})
    adapted.change(use_dora=False)
    adapted.refused(adapted.file, ".lora_magnitude_vector")


@pytest.mark.parametrize(
    ("end", "shape"), [("lora_A.weight", (4, 39)), ("lora_B.weight", (96, 3)), ("lora_B.weight", (0,))]
)
def test_shape_of_another_model(adapted, end, shape):
    name = f"{FIRST_QKV}.{end}"
    adapted.rewrite({**load_file(adapted.file), f"base_model.model.{name}": torch.ones(shape)})
    adapted.refused(adapted.file, name, list(shape))


def test_rank_that_the_file_does_not_have(adapted):
    adapted.change(rank_pattern={"dense_4h_to_h": 5})
    adapted.refused(adapted.file, "dense_4h_to_h.lora_A.weight", "[5, 56]")


def test_shape_of_a_module_to_save(tmp_path):
    adapted = Adapted(tmp_path, "chatglm2", {"target_modules": [QKV], "modules_to_save": ["output_layer"]})
    name = "base_model.model.transformer.output_layer.weight"
    adapted.rewrite({**load_file(adapted.file), name: torch.ones(92, 40)})
    adapted.refused(adapted.file, name, [92, 40], [90, 40])


def test_empty_adapter(adapted):
    adapted.change(target_modules=[])
    adapted.rewrite({})
    assert "no LoRA weights" in adapted.refused(adapted.file).en


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_damaged_files(adapted, name):
    path = adapted.folder / name
    path.write_bytes(path.read_bytes()[:50])
    adapted.refused(path)
    path.unlink()
    adapted.refused(path)


def test_what_is_wrong_is_found_before_the_weights_are_read(adapted):
    adapted.change(r=5)
    (adapted.base / "model.safetensors").write_bytes(b"damaged")
    adapted.refused(adapted.file)

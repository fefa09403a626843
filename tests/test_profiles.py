import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import Config
from server.errors import ModelError, StartupError
from server.footprint import GiB, ModelShape
from server.hardware import GPU, Hardware
from server.profiles import GPU_TIERS, ITEM_BYTES, KEPT, KEPT_BYTES, TIERS, choose

CHATGLM2_6B = {
    "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 32768,
}  # fmt: skip
DEMO = {**CHATGLM2_6B, "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 688, "num_attention_heads": 8,
        "kv_channels": 32, "seq_length": 2048}  # fmt: skip
CHATGLM_6B = {
    "num_layers": 28, "hidden_size": 4096, "inner_hidden_size": 16384, "num_attention_heads": 32,
    "vocab_size": 130528, "max_sequence_length": 2048,
}  # fmt: skip
SHAPE = ModelShape.from_config(CHATGLM2_6B)


def machine(vram=None, ram=64.0, torch_cuda="12.6", capability=(8, 6), more=(), kernels=False) -> Hardware:
    """A machine with so many GiB free; without a C compiler for the CPU kernels unless ``kernels``."""
    sizes = (() if vram is None else (vram,)) + more
    gpus = tuple(GPU(i, f"GPU{i}", int(v * GiB), int(v * GiB), capability) for i, v in enumerate(sizes))
    return Hardware(gpus=gpus, torch_cuda=torch_cuda, ram_available=int(ram * GiB), cores=6, kernels=kernels)


def test_shape_has_the_models_real_numbers():
    # the checkpoint's own total counts 32 rotary values more, which are computed and not loaded
    assert SHAPE.weight_bytes(16, 2) + 32 * 2 == 12_487_168_064
    assert SHAPE.kv * 2 == 28 * 1024


def test_shape_of_the_first_generation():
    shape = ModelShape.from_config(CHATGLM_6B)
    assert shape.kv * 2 == 448 * 1024
    linear = 3 * 4096**2 + 4096**2 + 2 * 4096 * 16384
    vectors = 13 * 4096  # biases and norms of a layer
    table, rest = 130528 * 4096, 28 * vectors + 2 * 4096
    # embedding and output matrix are one, and two only where the output is quantized here
    assert shape.weight_bytes(16, 2) == 2 * (28 * linear + rest + table)
    assert shape.weight_bytes(8, 2) == (28 * linear + table) * 17 // 16 + 2 * (rest + table)


def test_prompts_that_are_read_whole_need_room_for_all_their_rows():
    shape = ModelShape.from_config(CHATGLM_6B)
    sizes = {"bits": 16, "item": 2, "gpu": True, "slots": 1, "max_length": 2048, "chunk": 256}
    rows = 2048 * shape.ffn * 2 * 2
    assert shape.full_house(**sizes) - replace(shape, causal_prompt=True).full_house(**sizes) == rows


def independent_full_house(profile) -> int:
    """Weights and cache written out from the model's tensors, not from ModelShape."""
    item = ITEM_BYTES[profile.dtype]
    layer = 4608 * 4096 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696
    linears, embedding = 28 * layer + 65024 * 4096, 65024 * 4096
    small = 28 * (2 * 4096 + 4608) + 4096
    per_weight = {4: 4.5 / 8, 8: 8.5 / 8, 16: item}[profile.bits]
    cache = (profile.slots + profile.kept) * profile.max_length * 28 * 2 * 2 * 128 * item
    return int(linears * per_weight) + (embedding + small) * item + cache


@pytest.mark.parametrize("name", GPU_TIERS)
def test_a_full_house_fits_into_its_tier(name):
    memory = TIERS[name].memory
    profile = choose(machine(memory / GiB), SHAPE, Config(profile=name))
    assert profile.name == name and profile.warnings == ()
    assert profile.slots * 2 >= TIERS[name].slots
    beside = profile.needs - independent_full_house(profile)
    assert 0.6 * GiB < beside < 1.6 * GiB  # runtime and working memory
    assert profile.needs <= memory


@pytest.mark.parametrize(("ram", "bits"), [(32, 16), (13, 16), (12, 8), (8.5, 8), (7, 4), (6, 4)])
def test_cpu_takes_the_fastest_that_fits(ram, bits):
    profile = choose(machine(ram=ram), SHAPE, Config())
    assert (profile.name, profile.device, profile.bits, profile.dtype) == ("cpu", "cpu", bits, "bfloat16")
    assert independent_full_house(profile) < profile.needs <= ram * GiB
    assert profile.threads == 6


@pytest.mark.parametrize(
    ("free", "name", "bits"), [(80, "large", 16), (13, "large", 16), (12, "medium", 8), (10, "medium", 8),
                               (8, "small", 4), (6, "small", 4), (5.1, "small", 4)],
)  # fmt: skip
def test_auto_goes_by_free_memory(free, name, bits):
    profile = choose(machine(free), SHAPE, Config())
    assert (profile.name, profile.bits, profile.device, profile.dtype) == (name, bits, "cuda:0", "float16")
    assert profile.needs <= free * GiB and profile.warnings == ()


def test_total_memory_does_not_count():
    gpu = GPU(0, "busy", 24 * GiB, 3 * GiB, (8, 6))
    profile = choose(Hardware(gpus=(gpu,), torch_cuda="12.6", ram_available=64 * GiB, cores=4), SHAPE, Config())
    assert profile.name == "cpu" and "3.0 GiB" in profile.warnings[0].en


def test_the_gpu_with_most_free_memory_is_taken():
    assert choose(machine(6, more=(24, 12)), SHAPE, Config()).device == "cuda:1"
    assert choose(machine(6, more=(24, 12)), SHAPE, Config(device="cuda:2")).device == "cuda:2"


def test_of_several_gpus_the_first_one_named_is_taken_with_a_note():
    profile = choose(machine(24, more=(24, 12)), SHAPE, Config(device="cuda:2,0"))
    assert profile.device == "cuda:2" and [note.en for note in profile.warnings] == ["only one GPU is used: cuda:2"]
    assert choose(machine(24), SHAPE, Config(device="cuda:0")).warnings == ()
    with pytest.raises(StartupError, match=r"usable cuda:3: .*cuda:0"):
        choose(machine(24), SHAPE, Config(device="cuda:3,0"))


def test_single_values_override():
    asked = Config(quantize=8, slots=3, max_length=8192, prefill_chunk=64, dtype="float32", threads=2)
    profile = choose(machine(24), SHAPE, asked)
    got = (profile.name, profile.bits, profile.slots, profile.max_length, profile.prefill_chunk, profile.dtype)
    assert got == ("medium", 8, 3, 8192, 64, "float32")
    assert profile.threads == 2


@pytest.mark.parametrize(
    ("hardware", "config"),
    [
        (machine(6), Config(profile="large")),
        (machine(6), Config(quantize=16)),
        (machine(3), Config(device="cuda")),
        (machine(ram=8), Config(quantize=16)),
    ],
    ids=str,
)
def test_explicit_choices_are_done_with_a_warning(hardware, config):
    profile = choose(hardware, SHAPE, config)
    assert profile.bits == (config.quantize or TIERS[profile.name].bits)
    (warning,) = profile.warnings
    assert f"{profile.needs / GiB:.1f} GiB" in warning.zh and f"{profile.needs / GiB:.1f} GiB" in warning.en


def test_gpu_profile_without_a_gpu_runs_on_the_cpu_with_a_warning():
    profile = choose(machine(), SHAPE, Config(profile="small"))
    assert (profile.device, profile.bits) == ("cpu", 4)
    assert "no NVIDIA GPU" in profile.warnings[0].en


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [
        (machine(24, torch_cuda=None), "installed for the CPU"),
        (machine(24, capability=(3, 5)), "too old"),
        (machine(24, capability=(7, 0), torch_cuda="13.0"), "too old"),
    ],
)
def test_gpu_that_torch_cannot_use(hardware, reason):
    profile = choose(hardware, SHAPE, Config())
    assert profile.device == "cpu" and reason in profile.warnings[0].en
    with pytest.raises(StartupError, match=reason):
        choose(hardware, SHAPE, Config(device="cuda"))


@pytest.mark.parametrize("config", [Config(device="cpu"), Config(profile="cpu")])
def test_cpu_by_request(config):
    assert choose(machine(24), SHAPE, config).device == "cpu"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(device="cuda"), "no NVIDIA GPU"),
        (Config(max_length=40000), "32768"),
        (Config(device="cuda", profile="cpu"), "contradicts"),
    ],
)
def test_impossible_requests(config, said):
    with pytest.raises(StartupError, match=said) as caught:
        choose(machine(), SHAPE, config)
    assert caught.value.param


def test_gpu_that_is_not_there():
    with pytest.raises(StartupError, match=r"cuda:3.*cuda:0"):
        choose(machine(24), SHAPE, Config(device="cuda:3"))


@pytest.mark.parametrize("shape", [SHAPE, ModelShape.from_config(DEMO)], ids=["6b", "demo"])
def test_more_threads_than_there_are(shape):
    hardware = replace(machine(kernels=True), threads=12)  # 6 cores with hyper-threading
    assert choose(hardware, shape, Config(threads=12)).warnings == ()
    profile = choose(hardware, shape, Config(threads=999))
    assert profile.threads == 12
    assert "--threads 999" in profile.warnings[-1].en and "--threads 999" in profile.warnings[-1].zh


def test_with_kernels_the_cpu_computes_4_bits_in_float32():
    profile = choose(machine(kernels=True), SHAPE, Config())
    assert (profile.name, profile.bits, profile.dtype, profile.kernels, profile.warnings) == (
        "cpu", 4, "float32", True, ()
    )  # fmt: skip
    # 4.125 bits and the row scales, the embedding in 16 bits, keys and values in 16 bits
    weights = (28 * (4608 * 4096 + 4096 * 4096 + 27392 * 4096 + 4096 * 13696) + 65024 * 4096) * 4.125 / 8
    cache = (profile.slots + profile.kept) * profile.max_length * 28 * 2 * 2 * 128 * 2
    assert weights + 65024 * 4096 * 2 + cache < profile.needs < weights * 1.1 + 65024 * 4096 * 2 + cache + 0.7 * GiB
    assert choose(machine(kernels=True), SHAPE, Config(quantize=8)).kernels
    for plain in (Config(quantize=16), Config(dtype="bfloat16", quantize=4)):
        assert not choose(machine(kernels=True), SHAPE, plain).kernels


def test_without_a_compiler_torch_computes_and_says_what_to_do():
    profile = choose(machine(), SHAPE, Config())
    assert (profile.bits, profile.kernels) == (16, False)
    assert "ziglang" in profile.warnings[-1].zh and "ziglang" in profile.warnings[-1].en
    assert choose(machine(), SHAPE, Config(quantize=16)).warnings == ()


def test_nothing_fits():
    with pytest.raises(StartupError) as caught:
        choose(machine(3, ram=4), SHAPE, Config())
    assert "3.0 GiB" in caught.value.en and "4.0 GiB" in caught.value.en and "--model demo" in caught.value.zh


def test_small_model_goes_to_the_cpu_in_float32():
    demo = ModelShape.from_config(DEMO)
    profile = choose(machine(24), demo, Config(model="demo"))
    assert (profile.device, profile.dtype, profile.bits, profile.max_length) == ("cpu", "float32", 16, 2048)
    assert profile.slots > 1 and profile.kept == KEPT
    assert choose(machine(24), demo, Config(device="cuda")).device == "cuda:0"
    assert choose(machine(), demo, Config(quantize=4)).bits == 4
    assert choose(machine(), demo, Config(dtype="bfloat16")).dtype == "bfloat16"


def test_stored_quantization_wins():
    shape = ModelShape.from_config({**CHATGLM2_6B, "quantization_bit": 4})
    # the official int4 file: 3,923,712,365 bytes, one scale per row instead of per 32 weights
    assert 3_923_712_365 < shape.weight_bytes(4, 2) < 1.1 * 3_923_712_365
    assert choose(machine(24), shape, Config()).bits == 4
    assert choose(machine(24), shape, Config(profile="large")).bits == 4
    assert choose(machine(ram=64), shape, Config()).bits == 4
    with pytest.raises(StartupError, match="stored in 4 bits"):
        choose(machine(24), shape, Config(quantize=8))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "Cannot read"), ("{", "Cannot read"), ("[]", "Cannot read"), ("{}", "num_layers")]
)
def test_damaged_config_json(content, said, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_shape_from_folder(encoding, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM2_6B), encoding=encoding)
    assert ModelShape.from_folder(tmp_path) == SHAPE


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (CHATGLM2_6B, "num_layers", "28"),
        (CHATGLM2_6B, "seq_length", "32768"),
        (CHATGLM2_6B, "padded_vocab_size", 0),
        (CHATGLM2_6B, "quantization_bit", "4"),
        (CHATGLM2_6B, "multi_query_group_num", [2]),
        (CHATGLM_6B, "quantization_bit", "4"),
        (CHATGLM_6B, "pre_seq_len", "128"),
        (CHATGLM_6B, "pre_seq_len", -1),
        (CHATGLM_6B, "max_sequence_length", 2048.5),
        (CHATGLM_6B, "inner_hidden_size", True),
    ],
    ids=str,
)
def test_a_number_that_is_none_is_named(config, name, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ModelError) as caught:
        ModelShape.from_folder(tmp_path)
    for text in (caught.value.zh, caught.value.en):
        assert f"{tmp_path / 'config.json'}" in text and name in text and repr(value) in text
    assert caught.value.param == name


def test_a_tuned_prefix_is_in_every_slot():
    tuned = ModelShape.from_config({**CHATGLM2_6B, "pre_seq_len": 128})
    sizes = {"bits": 16, "item": 2, "gpu": True, "slots": 8, "chunk": 256}
    plain = SHAPE.full_house(max_length=2048, **sizes)
    assert tuned.full_house(max_length=2048, **sizes) == SHAPE.full_house(max_length=2048 + 128, **sizes) > plain
    assert ModelShape.from_config({**CHATGLM2_6B, "pre_seq_len": None}) == SHAPE


def test_quantized_embedding_is_counted_once():
    config = {**CHATGLM_6B, "quantization_bit": 4}
    table, matrix = 130528 * 4096, 28 * 12 * 4096**2
    both = ModelShape.from_config({**config, "quantization_embeddings": True}).weight_bytes(4, 2)
    vectors = 2 * (28 * 13 * 4096 + 2 * 4096)
    assert both == int((matrix + table) * 4.5 / 8) + vectors
    assert ModelShape.from_config(config).weight_bytes(4, 2) == int(matrix * 4.5 / 8) + vectors + 2 * table


def cache_bytes(profile, slots) -> int:
    """Of ChatGLM2-6B."""
    return slots * profile.max_length * 28 * 2 * 2 * 128 * ITEM_BYTES[profile.dtype]


sizes = st.floats(0, 80)
asked = st.builds(
    Config,
    profile=st.sampled_from(["auto", "cpu", *GPU_TIERS]),
    quantize=st.sampled_from([None, 4, 8, 16]),
    dtype=st.sampled_from(["auto", "float32"]),
    max_length=st.sampled_from([None, 512, 32768]),
    slots=st.sampled_from([None, 1, 5]),
)


@given(st.none() | sizes, sizes, asked)
def test_conversations_are_kept_in_what_is_left(vram, ram, config):
    hardware = machine(vram, ram)
    try:
        alone = choose(hardware, SHAPE, replace(config, keep=0))
    except StartupError:
        with pytest.raises(StartupError):
            choose(hardware, SHAPE, config)
        return
    profile = choose(hardware, SHAPE, config)
    # nothing else depends on them, least of all how many run at once
    assert replace(profile, kept=0, needs=alone.needs) == alone
    assert profile.needs - alone.needs == cache_bytes(profile, profile.kept)
    free = hardware.ram_available if profile.device == "cpu" else hardware.gpus[0].free
    budget = min(KEPT_BYTES, (free - alone.needs) // 2)
    assert 0 <= profile.kept <= KEPT
    assert profile.kept == 0 or cache_bytes(profile, profile.kept) <= budget
    assert profile.kept == KEPT or cache_bytes(profile, profile.kept + 1) > budget


@pytest.mark.parametrize("hardware", [machine(80), machine(ram=64)], ids=["gpu", "cpu"])
def test_how_many_conversations_are_kept(hardware):
    assert choose(hardware, SHAPE, Config()).kept == 16  # of 112 MiB each
    assert choose(hardware, SHAPE, Config(max_length=32768)).kept == 2  # of 896 MiB


def test_as_many_conversations_as_asked_for_are_kept_where_they_fit():
    kept = [choose(machine(ram=ram), SHAPE, Config(keep=100)).kept for ram in (200, 24)]
    assert kept[0] == 100 and KEPT < kept[1] < 100
    assert choose(machine(24, ram=24), SHAPE, Config(keep=3)).kept == 3


@pytest.mark.parametrize("config", [Config(), Config(keep=5)])
@pytest.mark.parametrize("hardware", [machine(80), machine(ram=64)], ids=["gpu", "cpu"])
def test_a_model_that_reads_its_prompt_in_both_directions_keeps_none(hardware, config):
    assert choose(hardware, ModelShape.from_config(CHATGLM_6B), config).kept == 0

"""Every stored result of the official implementations (and of our own reference checkpoints) is reproduced.

Folders: tests/data/reference, and $ORACLE_DIR/models (default ../shared/oracle) where it is there.
"""

import pytest
import torch

from server.kernels.torch_ops import dequantize
from server.models.families import families
from tests.models.reference import load_reference, reference_folders


def close(ref, actual, expected):
    torch.testing.assert_close(actual, expected, atol=ref.tolerance, rtol=0)


def prefill(ref):
    for i, case in enumerate(ref.vectors["cases"]):
        (logits,) = ref.conversation().feed(case["input_ids"])
        close(ref, logits, ref.tensors[f"case{i}.prefill_logits"])


def decode(ref):
    for i, case in enumerate(ref.vectors["cases"]):
        talk = ref.conversation()
        talk.feed(case["input_ids"])
        logits = torch.cat([talk.feed([token])[0] for token in case["decode_ids"]])
        close(ref, logits, ref.tensors[f"case{i}.decode_logits"])


def kv_cache(ref):
    for i, case in enumerate(ref.vectors["cases"]):
        if f"case{i}.key_cache_after_decode" in ref.tensors:
            talk = ref.conversation()
            talk.feed(case["input_ids"])
            for token in case["decode_ids"]:
                talk.feed([token])
            keys, values = talk.cached()
            close(ref, keys, ref.tensors[f"case{i}.key_cache_after_decode"])
            close(ref, values, ref.tensors[f"case{i}.value_cache_after_decode"])


def greedy_32(ref):
    for case in ref.vectors["cases"]:
        assert ref.conversation().greedy(case["input_ids"], count=32) == [case["greedy_32"]]


def chunked(ref):
    ids, talk, logits = ref.vectors["chunked"]["input_ids"], ref.conversation(), []
    for length in ref.vectors["chunked"]["chunks"]:
        (part,) = talk.feed(ids[:length])
        ids = ids[length:]
        logits.append(part)
    close(ref, torch.cat(logits), ref.tensors["chunked.logits"])


def unpadded(batch):
    """The official code pads on the left; ours lays the rows end to end."""
    if "lengths" in batch:
        return [ids[-n:] for ids, n in zip(batch["input_ids"], batch["lengths"], strict=True)]
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def batch(ref):
    rows = unpadded(ref.vectors["batch"])
    talk = ref.conversation(len(rows))
    for logits, padded in zip(talk.feed(*rows), ref.tensors["batch.prefill_logits"], strict=True):
        close(ref, logits, padded[-len(logits) :])
    for j, step in enumerate(ref.vectors["batch"].get("steps", [])):
        close(ref, torch.cat(talk.feed(*step["input_ids"])), ref.tensors[f"batch.step{j}_logits"])


def batch_greedy(ref):
    key = next(key for key in ("greedy_12", "greedy_10") if key in ref.vectors["batch"])
    rows, expected = unpadded(ref.vectors["batch"]), ref.vectors["batch"][key]
    assert ref.conversation(len(rows)).greedy(*rows, count=len(expected[0])) == expected


def stops(case):
    eos = case["eos_token_id"]
    return frozenset(eos if isinstance(eos, list) else [eos])


def eos_stop(ref):
    case = ref.vectors["eos_stop"]
    expected = case.get("output_ids_including_eos") or case["generate_output_including_eos"]
    assert ref.conversation().greedy(case["input_ids"], count=100, stop=stops(case)) == [expected]


def stream_generate(ref):
    case = ref.vectors["stream_generate"]
    count = case["max_new_tokens"]
    (ids,) = ref.conversation().greedy(case["input_ids"], count=count, stop=stops(case))
    assert [ids[: n + 1] for n in range(len(ids))] == case["yields"]


def prefix(ref):
    keys, values = ref.prefix
    torch.testing.assert_close(keys, ref.tensors["prefix_key"], atol=1e-6, rtol=0)
    torch.testing.assert_close(values, ref.tensors["prefix_value"], atol=1e-6, rtol=0)


def mask(ref):
    (logits,) = ref.conversation().feed(ref.vectors["mask"]["input_ids"])
    close(ref, logits, ref.tensors["mask.prefill_logits"])


def dequant(ref):
    codes = load_reference(ref.folder, ref.config["quantization_bit"])
    for name, expected in ref.tensors.items():
        if name.startswith("dequant."):
            module = name.removeprefix("dequant.")
            assert torch.equal(ref.network.get_submodule(module).weight, expected)
            kept = codes.network.get_submodule(module)
            assert torch.equal(dequantize(kept._weight, torch.float32), expected)


def quantized_layers(ref):
    """The codes of an official checkpoint, used as they are."""
    codes = load_reference(ref.folder, ref.config["quantization_bit"])
    prefill(codes)
    decode(codes)


# each kind of result, and whether a folder holds it
KINDS = {
    prefill: lambda ref: "cases" in ref.vectors,
    decode: lambda ref: "cases" in ref.vectors,
    kv_cache: lambda ref: any(name.endswith("key_cache_after_decode") for name in ref.tensors),
    greedy_32: lambda ref: "cases" in ref.vectors,
    chunked: lambda ref: "chunked" in ref.vectors,
    batch: lambda ref: "batch" in ref.vectors,
    batch_greedy: lambda ref: "batch" in ref.vectors,
    eos_stop: lambda ref: "eos_stop" in ref.vectors,
    stream_generate: lambda ref: "stream_generate" in ref.vectors,
    prefix: lambda ref: "prefix_key" in ref.tensors,
    mask: lambda ref: "mask" in ref.vectors,
    dequant: lambda ref: any(name.startswith("dequant.") for name in ref.tensors),
    quantized_layers: lambda ref: "quantization_bit" in ref.config,
}


def collect():
    known = {family.name for family in families()}
    for folder in reference_folders():
        ref = load_reference(folder)
        for check, holds in KINDS.items():
            if holds(ref):
                unknown = pytest.mark.skipif(ref.family_name not in known, reason=f"no family {ref.family_name} yet")
                yield pytest.param(ref, check, id=f"{folder.name}-{check.__name__}", marks=unknown)


@pytest.mark.parametrize(("ref", "check"), list(collect()))
def test_reference(ref, check):
    check(ref)

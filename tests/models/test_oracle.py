"""Every stored result of the official implementations (and of our own reference checkpoints) is reproduced.

Folders: tests/data/reference, and $ORACLE_DIR/models (default ../shared/oracle) where it is there; any other folder of
that layout, whatever parts of it are there. Logits are compared with the stored float32 ones; greedy answers are equal.
(The folders chatglmcpp/ hold hidden states of models without an output layer: test_network.py.)
"""

import pytest
import torch

from server.errors import ModelError
from server.kernels.torch_ops import dequantize
from tests.models.differences import PROPERTY
from tests.models.reference import greedy_ids, load_reference, reference_folders, stopped_ids


class Check:
    """One test: what it compares is reported, with the generation and the precision."""

    def __init__(self, reference, record):
        self.ref = reference
        self._record = record
        self.title = f"{reference.generation}, {reference.precision}, {reference.folder}"

    def close(self, actual, expected, what, tolerance=None):
        tolerance = tolerance or self.ref.tolerance
        assert actual.shape == expected.shape, f"{self.title}: {what} is {actual.shape} instead of {expected.shape}"
        difference = (actual - expected).abs()
        largest = float(difference.max()) if difference.isfinite().all() else float("inf")
        where = f"{self.ref.folder.name} {what}"
        self._record(PROPERTY, (self.ref.generation, self.ref.precision, largest, "", where))
        place = torch.unravel_index(difference.argmax(), difference.shape)
        assert largest <= tolerance, (
            f"{self.title}: {what} differs by {largest:.2e} at {[int(i) for i in place]}, allowed {tolerance:.0e}"
        )

    def equal(self, actual, expected, what):
        wrong = next((i for i, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1]), None)
        assert actual == expected, f"{self.title}: {what} is {actual} instead of {expected}, first at {wrong}"


def cases(ref):
    return list(enumerate(ref.vectors.get("cases", [])))


def prefill(check):
    ref = check.ref
    for i, case in cases(ref):
        if f"case{i}.prefill_logits" in ref.tensors:
            (logits,) = ref.conversation().feed(case["input_ids"])
            check.close(logits, ref.tensors[f"case{i}.prefill_logits"], f"case{i}.prefill_logits")


def decode(check):
    ref = check.ref
    for i, case in cases(ref):
        if f"case{i}.decode_logits" in ref.tensors:
            talk = ref.conversation()
            talk.feed(case["input_ids"])
            logits = torch.cat([talk.feed([token])[0] for token in case["decode_ids"]])
            check.close(logits, ref.tensors[f"case{i}.decode_logits"], f"case{i}.decode_logits")


def kv_cache(check):
    ref = check.ref
    for i, case in cases(ref):
        if f"case{i}.key_cache_after_decode" in ref.tensors:
            talk = ref.conversation()
            talk.feed(case["input_ids"])
            for token in case["decode_ids"]:
                talk.feed([token])
            for name, ours in zip(("key", "value"), talk.cached(), strict=True):
                expected = ref.tensors[f"case{i}.{name}_cache_after_decode"]
                if expected.shape[1] == talk.lengths[0]:  # stored without the P-tuning prefix
                    ours = ours[:, -talk.lengths[0] :]
                check.close(ours, expected, f"case{i}.{name}_cache_after_decode")


def greedy(check):
    for i, case in cases(check.ref):
        if expected := greedy_ids(case):
            (answer,) = check.ref.conversation().greedy(case["input_ids"], count=len(expected))
            check.equal(answer, expected, f"case{i}, greedy")


def chunked(check):
    ref = check.ref
    ids, talk, logits = ref.vectors["chunked"]["input_ids"], ref.conversation(), []
    for length in ref.vectors["chunked"]["chunks"]:
        (part,) = talk.feed(ids[:length])
        ids = ids[length:]
        logits.append(part)
    check.close(torch.cat(logits), ref.tensors["chunked.logits"], "chunked.logits")


def real_tokens(batch):
    """bool [rows, n]: which of the ids are no padding, that the official code needs and ours does not."""
    if "lengths" in batch:
        width = len(batch["input_ids"][0])
        return torch.arange(width) >= width - torch.tensor(batch["lengths"]).unsqueeze(1)
    mask = batch.get("attention_mask", [[1] * len(ids) for ids in batch["input_ids"]])
    return torch.tensor(mask).bool()


def unpadded(batch):
    pairs = zip(batch["input_ids"], real_tokens(batch).tolist(), strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def batch(check):
    ref, stored = check.ref, check.ref.vectors["batch"]
    rows = unpadded(stored)
    talk = ref.conversation(len(rows))
    for r, (logits, mask) in enumerate(zip(talk.feed(*rows), real_tokens(stored), strict=True)):
        if "batch.prefill_logits" in ref.tensors:
            check.close(logits, ref.tensors["batch.prefill_logits"][r][mask], f"batch.prefill_logits[{r}]")
    for j, step in enumerate(stored.get("steps", [])):
        logits = torch.cat(talk.feed(*step["input_ids"]))
        check.close(logits, ref.tensors[f"batch.step{j}_logits"], f"batch.step{j}_logits")


def batch_greedy(check):
    rows, expected = unpadded(check.ref.vectors["batch"]), greedy_ids(check.ref.vectors["batch"])
    answers = check.ref.conversation(len(rows)).greedy(*rows, count=len(expected[0]))
    for r, (answer, ids) in enumerate(zip(answers, expected, strict=True)):
        check.equal(answer, ids, f"batch, greedy, row {r}")


def stops(case):
    eos = case["eos_token_id"]
    return frozenset(eos if isinstance(eos, list) else [eos])


def eos_stop(check):
    case = check.ref.vectors["eos_stop"]
    expected = stopped_ids(case)
    (answer,) = check.ref.conversation().greedy(case["input_ids"], count=len(expected), stop=stops(case))
    check.equal(answer, expected, "eos_stop")


def stream_generate(check):
    case = check.ref.vectors["stream_generate"]
    (ids,) = check.ref.conversation().greedy(case["input_ids"], count=case["max_new_tokens"], stop=stops(case))
    check.equal([ids[: n + 1] for n in range(len(ids))], case["yields"], "stream_generate")


def prefix(check):
    for name, ours in zip(("prefix_key", "prefix_value"), check.ref.prefix, strict=True):
        check.close(ours, check.ref.tensors[name], name, 2e-6)


def mask(check):
    (logits,) = check.ref.conversation().feed(check.ref.vectors["mask"]["input_ids"])
    check.close(logits, check.ref.tensors["mask.prefill_logits"], "mask.prefill_logits")


def dequant(check):
    ref = check.ref
    codes = load_reference(ref.folder, ref.config["quantization_bit"])
    for name, expected in ref.tensors.items():
        if name.startswith("dequant."):
            module = name.removeprefix("dequant.")
            assert torch.equal(ref.network.get_submodule(module).weight, expected), f"{check.title}: {name}"
            kept = codes.network.get_submodule(module)
            assert torch.equal(dequantize(kept.weight, torch.float32), expected), f"{check.title}: {name}, codes"


def codes(check):
    """An official quantized checkpoint's codes, used as they are."""
    check.ref = load_reference(check.ref.folder, check.ref.config["quantization_bit"])
    prefill(check)
    decode(check)
    greedy(check)


def nothing(check):
    pytest.fail(f"{check.title}: vectors.json and vectors.safetensors hold nothing that could be compared")


# each kind of result, and whether a folder holds it
KINDS = {
    prefill: lambda ref: any(name.endswith(".prefill_logits") for name in ref.tensor_names),
    decode: lambda ref: any(name.endswith(".decode_logits") for name in ref.tensor_names),
    kv_cache: lambda ref: any(name.endswith("key_cache_after_decode") for name in ref.tensor_names),
    greedy: lambda ref: any(greedy_ids(case) for _, case in cases(ref)),
    chunked: lambda ref: "chunked.logits" in ref.tensor_names,
    batch: lambda ref: "batch" in ref.vectors,
    batch_greedy: lambda ref: greedy_ids(ref.vectors.get("batch", {})) is not None,
    eos_stop: lambda ref: "eos_stop" in ref.vectors,
    stream_generate: lambda ref: "stream_generate" in ref.vectors,
    prefix: lambda ref: "prefix_key" in ref.tensor_names,
    mask: lambda ref: "mask.prefill_logits" in ref.tensor_names,
    dequant: lambda ref: any(name.startswith("dequant.") for name in ref.tensor_names),
    codes: lambda ref: ref.config.get("quantization_bit"),
}


def collect():
    for folder in reference_folders():
        ref = load_reference(folder)
        kinds = [check for check, holds in KINDS.items() if holds(ref)] or [nothing]
        precision = ref.precision.replace(" ", "-")
        for check in kinds:
            yield pytest.param(ref, check, id=f"{folder.name}-{precision}-{check.__name__}")


@pytest.mark.parametrize(("ref", "check"), list(collect()))
def test_reference(ref, check, record_property):
    try:
        check(Check(ref, record_property))
    except ModelError as error:
        pytest.fail(f"{ref.folder}: {error.en}")

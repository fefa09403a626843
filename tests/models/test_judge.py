"""The judges of tests/data/reference: they agree with the official results, with each other, and with our network."""

import pytest
import torch
from safetensors.torch import load_file

from server.engine.kv_cache import KVCache
from server.kernels.torch_ops import TorchOps
from server.models.base import ForwardBatch, Segment
from server.models.families import find_family
from server.models.files import read_json
from server.models.loader import load_network
from tests.conftest import ROOT
from tests.models.half_precision import plain_reference
from tests.models.reference import OWN, load_reference, reference_folders
from tests.oracle import ORACLE, oracle_file
from tools.official_packing import pack_checkpoint, unpack_checkpoint
from tools.reference_checkpoints import stored_weights

FOLDERS = [*sorted(OWN.glob("*")), *sorted((ORACLE / "models").glob("glm[23]-*")), ROOT / "THUDM" / "demo"]
PACKED = ("glm1-a-int4", "glm1-a-int8", "glm2-a-int4", "glm2-a-int8")


def judged(folder):
    """A float checkpoint of the ChatGLM2 block without a P-tuning prefix, which GLM does not know."""
    if not (folder / "config.json").exists():
        return False
    config = read_json(folder / "config.json")
    unknown = ("quantization_bit", "pre_seq_len", "inner_hidden_size")
    return not any(config.get(name) for name in unknown)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if judged(f)], ids=lambda folder: folder.name)
@torch.inference_mode()
def test_same_logits_as_transformers_glm(folder):
    pytest.importorskip("transformers")
    from tools.reference_judges import GlmJudge

    config = read_json(folder / "config.json")
    name = "chatglm3" if "glm3" in folder.name else "chatglm2"
    judge = GlmJudge(config, name, stored_weights(folder))
    network, _ = load_network(
        folder, config, find_family(config, folder, name), dtype=torch.float32, device="cpu", ops=TorchOps()
    )
    ids = torch.randint(0, network.vocab_size, (101,), generator=torch.Generator().manual_seed(5))
    cache = KVCache(network.kv_shape, 1, 128, torch.float32, "cpu")
    parts = []
    for start, end in ((0, 1), (1, 64), (64, 65), (65, 101)):
        segment = Segment(0, start, end - start)
        parts.append(network.forward(ForwardBatch(ids[start:end], [segment], torch.arange(end - start)), cache))
    torch.testing.assert_close(torch.cat(parts), judge.logits(ids.tolist()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
@torch.inference_mode()
def test_plain_network_gives_the_stored_results(folder):
    """Those of the official code in $ORACLE_DIR, those of transformers' GLM (and its own) in tests/data."""
    ref = load_reference(folder)
    network = plain_reference(ref)
    for i, case in enumerate(ref.vectors.get("cases", [])):
        decoded = case.get("decode_ids", []) if f"case{i}.decode_logits" in ref.tensors else []
        logits = network(torch.tensor(case["input_ids"] + decoded))
        names = [f"case{i}.{part}_logits" for part in ("prefill", "decode")]
        for rows, name in zip(logits.split([len(case["input_ids"]), len(decoded)]), names, strict=True):
            if name in ref.tensors:
                torch.testing.assert_close(rows, ref.tensors[name], atol=ref.tolerance, rtol=0)
        if f"case{i}.key_cache_after_decode" in ref.tensors:
            for name, ours in zip(("key", "value"), network.keys_values(), strict=True):
                stored = ref.tensors[f"case{i}.{name}_cache_after_decode"]
                ours = ours[:, -stored.shape[1] :]  # the P-tuning prefix may not be stored
                torch.testing.assert_close(ours, stored, atol=ref.tolerance, rtol=0)


@pytest.mark.parametrize("name", PACKED)
def test_packing_is_the_official_one(name):
    folder = oracle_file("models", name)
    bits = read_json(folder / "config.json")["quantization_bit"]
    stored = load_file(folder / "model.safetensors")
    packed = pack_checkpoint(load_file(folder / "source_fp16.safetensors"), bits)
    assert len(packed) == 2 * sum(tensor.dtype == torch.int8 for tensor in stored.values())
    for weight, tensor in packed.items():
        assert torch.equal(tensor, stored[weight]), weight
    unpacked = unpack_checkpoint(stored, bits)
    vectors = load_file(folder / "vectors.safetensors")
    for weight in (weight for weight in vectors if weight.startswith("dequant.")):
        assert torch.equal(unpacked[weight.removeprefix("dequant.") + ".weight"], vectors[weight])

"""Our network beside transformers' GlmForCausalLM, which shares no code with it, on the same weights."""

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
from tests.models.reference import OWN
from tests.oracle import ORACLE

FOLDERS = [*sorted(OWN.glob("*")), *sorted((ORACLE / "models").glob("glm[23]-*")), ROOT / "THUDM" / "demo"]


def judged(folder):
    """A float checkpoint without a P-tuning prefix, which GLM does not know."""
    if not (folder / "model.safetensors").exists():
        return False
    config = read_json(folder / "config.json")
    return not config.get("quantization_bit") and not config.get("pre_seq_len")


@pytest.mark.parametrize("folder", [f for f in FOLDERS if judged(f)], ids=lambda folder: folder.name)
@torch.inference_mode()
def test_same_logits_as_transformers_glm(folder):
    pytest.importorskip("transformers")
    from tools.make_reference import build_judge, judge_logits

    config = read_json(folder / "config.json")
    name = "chatglm3" if "glm3" in folder.name else "chatglm2"
    judge = build_judge(config, name, load_file(folder / "model.safetensors"))
    network, _ = load_network(
        folder, config, find_family(config, folder, name), dtype=torch.float32, device="cpu", ops=TorchOps()
    )
    ids = torch.randint(0, network.vocab_size, (101,), generator=torch.Generator().manual_seed(5))
    cache = KVCache(network.kv_shape, 1, 128, torch.float32, "cpu")
    parts = []
    for start, end in ((0, 1), (1, 64), (64, 65), (65, 101)):
        segment = Segment(0, start, end - start)
        parts.append(network.forward(ForwardBatch(ids[start:end], [segment], torch.arange(end - start)), cache))
    expected = judge_logits(judge, ids.tolist())
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=0)

"""The whole engine against the reference results: batched, in chunks, with reused prefixes, the ids stay equal."""

from types import SimpleNamespace

import pytest
import torch

from server.core import GenerationRequest, SamplingParams
from server.engine.local import EngineSettings, LocalEngine
from server.models.families import find_family
from tests.engine.doubles import PlainFamily
from tests.models.reference import load_reference, reference_folders


class AnyIds:
    """The reference checkpoints have no tokenizer: their results are ids."""

    def decode(self, ids):
        return ""


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_greedy_ids_through_the_engine(folder):
    reference = load_reference(folder)
    family = PlainFamily()
    family.causal_prompt = find_family(reference.config, folder, reference.family_name).causal_prompt
    family.stop_ids = lambda tokenizer: frozenset()
    model = SimpleNamespace(
        name=folder.name,
        family=family,
        tokenizer=AnyIds(),
        network=reference.network,
        prefix=reference.prefix,
        dtype=torch.float32,
        device="cpu",
    )
    engine = LocalEngine(model, EngineSettings(max_length=128, slots=2, queue=20, prefill_chunk=5))
    params = SamplingParams(temperature=0, max_tokens=32)
    try:
        for _ in range(2):
            cases = reference.vectors["cases"]
            requests = [GenerationRequest(prompt_ids=tuple(case["input_ids"]), params=params) for case in cases]
            streams = [engine.submit(request) for request in requests]
            answers = [[i for output in stream for i in output.token_ids] for stream in streams]
            assert answers == [case["greedy_32"] for case in cases]
    finally:
        engine.close()

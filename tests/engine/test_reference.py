"""The whole engine against the reference results: batched, in chunks, with reused prefixes, the ids stay equal."""

import pytest

from server.core import GenerationRequest, SamplingParams
from tests.engine.reference_engine import reference_engine
from tests.models.reference import reference_folders


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_greedy_ids_through_the_engine(folder):
    params = SamplingParams(temperature=0, max_tokens=32)
    with reference_engine(folder) as (engine, reference):
        for _ in range(2):
            cases = reference.vectors["cases"]
            requests = [GenerationRequest(prompt_ids=tuple(case["input_ids"]), params=params) for case in cases]
            streams = [engine.submit(request) for request in requests]
            answers = [[i for output in stream for i in output.token_ids] for stream in streams]
            assert answers == [case["greedy_32"] for case in cases]

"""The whole engine against the reference results: batched, in chunks, with reused prefixes, the ids stay equal."""

import pytest

from server.core import GenerationRequest, SamplingParams
from tests.engine.reference_engine import reference_engine
from tests.models.reference import greedy_ids, reference_folders


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_greedy_ids_through_the_engine(folder):
    with reference_engine(folder) as (engine, reference):
        cases = [case for case in reference.vectors.get("cases", []) if greedy_ids(case)]
        expected = [greedy_ids(case) for case in cases]
        for _ in range(2):
            streams = [engine.submit(request(case, ids)) for case, ids in zip(cases, expected, strict=True)]
            answers = [[i for output in stream for i in output.token_ids] for stream in streams]
            assert answers == expected, f"{reference.generation}, {reference.precision}"


def request(case, expected):
    params = SamplingParams(temperature=0, max_tokens=len(expected))
    return GenerationRequest(prompt_ids=tuple(case["input_ids"]), params=params)

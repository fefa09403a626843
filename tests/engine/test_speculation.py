"""Whole answers with drafts are those without, whatever is drafted, and the slots hold what they claim."""

from dataclasses import replace

import pytest
import torch

from server.core import GenerationRequest, Message, SamplingParams
from server.engine.local import EngineSettings, LocalEngine
from server.kernels.torch_ops import TorchOps
from server.models.loader import load_model
from tests.conftest import ROOT
from tests.engine.answers import GREEDY, ask, ids_request
from tests.engine.doubles import HashNetwork, expected
from tests.engine.reference_engine import reference_engine
from tests.models.reference import OWN, reference_folders

MIXED = [
    GREEDY,
    SamplingParams(temperature=0.9, top_p=0.9, seed=1, max_tokens=24),
    SamplingParams(temperature=1.5, top_p=1.0, top_k=0, seed=2, max_tokens=17),
    SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, max_tokens=24),
    SamplingParams(temperature=1, repetition_penalty=1.2, logit_bias={7: 3.0}, seed=3, max_tokens=24, logprobs=3),
    SamplingParams(temperature=0, max_tokens=9, logprobs=2),
    SamplingParams(temperature=0, max_tokens=1),
]


@pytest.mark.parametrize("folder", reference_folders(), ids=lambda folder: folder.name)
def test_all_kinds_of_answers_are_the_same(folder, told):
    """Greedy, sampled, with penalties, bias and log probabilities, five at a time, every family."""
    with reference_engine(folder, speculate=0) as (engine, reference):
        cases = [case["input_ids"] for case in reference.vectors["cases"]]
        requests = [ids_request(cases[i % len(cases)], params) for i, params in enumerate(MIXED)]
        plain = [ask(engine, request)[0] for request in requests]
    answers = iter(plain * 2)
    told(lambda ids: next(answers).ids, 0.7)
    with reference_engine(folder, slots=5, row_cost=0.01) as (engine, _):
        for _ in range(2):  # the second time with what the first left in the slots
            drafted = ask(engine, *requests)
            assert [answer.ids for answer in drafted] == [answer.ids for answer in plain]
            assert 20 < sum(answer.kept for answer in drafted) < sum(answer.drafted for answer in drafted)
            for with_it, without in zip(drafted, plain, strict=True):
                assert with_it.last.finish_reason is without.last.finish_reason
                assert [entry.token_id for entry in with_it.logprobs] == [entry.token_id for entry in without.logprobs]
                for got, wanted in zip(with_it.logprobs, without.logprobs, strict=True):
                    assert [top.token_id for top in got.top] == [top.token_id for top in wanted.top]
                    assert got.logprob == pytest.approx(wanted.logprob, abs=1e-3)


def test_prompt_lookup_on_a_text_that_repeats():
    with reference_engine(OWN / "tiny-chatglm2", speculate=0) as (engine, _):
        (once,) = ask(engine, ids_request(range(3, 20)))
        prompt = [*range(3, 20), *once.ids] * 2
        (plain,) = ask(engine, ids_request(prompt))
    with reference_engine(OWN / "tiny-chatglm2") as (engine, _):
        (drafted,) = ask(engine, ids_request(prompt))
    assert drafted.ids == plain.ids and drafted.drafted > plain.drafted == 0


@pytest.fixture(scope="module")
def demo():
    model = load_model(ROOT / "THUDM" / "demo", dtype=torch.float32, device="cpu", ops=TorchOps())
    with_it, without = (
        LocalEngine(model, EngineSettings(max_length=1024, slots=2, speculate=most)) for most in (None, 0)
    )
    yield with_it, without
    with_it.close()
    without.close()


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_demo_repeats_what_it_said(demo, temperature):
    """Its answer to the same question stands in the conversation already."""
    _, without = demo
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=120)
    question = Message("user", "你能做什么？")
    (first,) = ask(without, GenerationRequest(messages=(question,), params=params))
    talk = (question, Message("assistant", first.text), question)
    answers = [ask(engine, GenerationRequest(messages=talk, params=params))[0] for engine in demo]
    assert answers[0].ids == answers[1].ids and answers[0].text == answers[1].text
    if temperature == 0:
        assert answers[0].text == first.text
        assert answers[0].kept > 0.5 * len(answers[0].ids)
    raw = replace(params, max_tokens=80)
    prompts = ["白日依山尽，黄河入海流。白日依山尽，黄河", "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"]
    for prompt in prompts:
        pair = [ask(engine, GenerationRequest(prompt=prompt, params=raw))[0].ids for engine in demo]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_many_answers_at_once_are_each_right(hashing, told, p):
    """More requests than slots, prompts longer than a chunk, drafts of all qualities."""
    told(lambda ids: expected(ids, 40), p)
    prompts = [[1 + (i * j) % 30 for j in range(1, 3 + 3 * i)] for i in range(12)]
    network = HashNetwork()
    answers = ask(hashing(network, slots=4, queue=30), *map(ids_request, prompts))
    assert [answer.ids for answer in answers] == [expected(prompt, 24) for prompt in prompts]
    assert [answer.last.usage.completion_tokens for answer in answers] == [24] * 12
    kept = sum(answer.kept for answer in answers)
    assert (p > 0) == (kept > 0) and (p < 1) == (kept < sum(answer.drafted for answer in answers))


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_slots_hold_what_they_claim_afterwards(hashing, told, p):
    """A follow-up, another conversation, and the same question again, in slots with wrong drafts behind their ids."""
    told(lambda ids: expected(ids, 40), p)
    engine = hashing(slots=2, prefill_chunk=64)
    talks = [[9] * 4 + [20 + i] * 10 for i in range(3)]
    for turn in range(3):
        for talk in talks:
            (answer,) = ask(engine, ids_request(talk))
            assert answer.ids == expected(talk, 24)
            (again,) = ask(engine, ids_request([*talk, *answer.ids, 7, 8]))
            assert again.ids == expected([*talk, *answer.ids, 7, 8], 24)
            assert again.last.usage.cached_tokens >= len(talk) + 23
            talk += [*answer.ids[: 3 + turn], 5]


def test_no_prompt_is_cut_or_reused_where_it_is_read_in_both_directions(hashing, told):
    told(lambda ids: expected(ids, 40), 0.8)
    network = HashNetwork()
    engine = hashing(network, causal_prompt=False, prefill_chunk=8)
    for _ in range(2):
        (answer,) = ask(engine, ids_request(range(10, 50)))
        assert answer.ids == expected(range(10, 50), 24) and answer.last.usage.cached_tokens == 0

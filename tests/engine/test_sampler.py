"""The sampler against the official settings' results and against transformers' own processors."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import SamplingParams
from server.engine.sampler import Sampler, distribution, penalize
from server.engine.sequence import Drawn, Sequence
from tests.oracle import oracle_file


def dense(row, params):
    ids, probabilities = distribution(row, params)
    result = torch.zeros(row.shape[0])
    result[ids] = probabilities
    return result


def sequence(params, ids=(1, 2, 3), num_prompt=None):
    seq = Sequence("r", list(ids[:num_prompt]), params, frozenset(), 10_000)
    seq.token_ids = list(ids)
    return seq


def test_official_settings():
    cases = [c for c in json.loads(oracle_file("ops", "sampling.json").read_text())["cases"] if "settings" in c]
    assert cases
    for case in cases:
        given_settings = {k: v for k, v in case["settings"].items() if k != "do_sample"}
        params = SamplingParams(**{"top_k": 50, "top_p": 1.0, "temperature": 1.0, **given_settings})
        row = penalize(torch.tensor(case["logits"]), params, case["prompt_ids"], len(case["prompt_ids"]))
        wanted = torch.zeros(row.shape[0])
        for token, probability in case["probs"].items():
            wanted[int(token)] = probability
        torch.testing.assert_close(dense(row, params), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab", [7, 320, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 9999])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_same_distribution_as_transformers(vocab, top_k, top_p, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    row = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab + top_k)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, row[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(dense(row, params), scores.softmax(-1)[0], atol=1e-6, rtol=1e-4)


def test_repetition_penalty_as_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    row, ids = torch.randn(50), [3, 3, 9, 41]
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), row[None].clone())[0]
    torch.testing.assert_close(penalize(row, SamplingParams(repetition_penalty=1.3), ids, 2), wanted)


def test_presence_and_frequency_count_the_answer_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    row = penalize(torch.zeros(10), params, [1, 1, 2, 2, 2, 3], num_prompt=2)
    assert row.tolist() == [0, 0, -0.5 - 0.75, -0.5 - 0.25, 0, 0, 0, 0, 0, 0]


def test_draws_follow_the_distribution():
    """20,000 draws: every frequency within five standard errors of its probability."""
    row = torch.tensor([0.0, 1.0, 2.0, -1.0])
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=3)
    seq, sampler, draws = sequence(params), Sampler(), 20_000
    counts = Counter(sampler.sample(row[None], [seq])[0].token_ids[0] for _ in range(draws))
    for token, probability in enumerate(row.softmax(-1).tolist()):
        error = (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[token] / draws - probability) < 5 * error


def test_rounding_noise_does_not_change_a_seeded_draw():
    """Two almost equal candidates change places with the batch they are computed in; the draw must not."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=1.0, top_k=299, top_p=1.0, seed=5)
    for _ in range(200):
        row = torch.randn(300, generator=generator).round(decimals=1)  # many ties
        noisy = row + torch.randn(300, generator=generator) * 1e-6
        assert Sampler().sample(row[None], [sequence(params)]) == Sampler().sample(noisy[None], [sequence(params)])


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1e-9, top_k=0, top_p=1)])
def test_zero_temperature_is_greedy(params):
    rows = torch.randn(4, 100)
    assert Sampler().sample(rows, [sequence(params)] * 4) == [Drawn([best]) for best in rows.argmax(-1).tolist()]


def test_greedy_respects_penalties():
    row = torch.tensor([[3.0, 2.0, 1.0]])
    params = SamplingParams(temperature=0, repetition_penalty=9.0)
    assert Sampler().sample(row, [sequence(params, ids=(0,))]) == [Drawn([1])]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(1e-3, 100),
    st.integers(0, 60),
    st.floats(0, 1),
)
def test_any_finite_row_gives_a_valid_draw(row, temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.2)
    (((drawn,), _),) = Sampler().sample(torch.tensor([row]), [sequence(params, ids=(0,))])
    assert 0 <= drawn < len(row)

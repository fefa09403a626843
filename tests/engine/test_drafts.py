"""What is drafted, how much of it is checked, and that drawing along a draft changes nothing."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import SamplingParams
from server.engine.sampler import Sampler
from server.engine.sequence import Drawn, Sequence
from server.engine.speculation import (
    FIRST_CHANCE,
    MOST_ROWS,
    ROW_COST,
    Acceptance,
    Draft,
    Drafter,
    PromptLookup,
    allot,
    row_cost,
)

VOCAB = 12


def scanned(ids, most):
    """PromptLookup by its definition: look through the whole text."""
    for n in sorted(FIRST_CHANCE, reverse=True):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:]:
                text = list(ids)
                while len(text) < end + most:
                    text.append(text[len(text) - (len(ids) - end)])
                return Draft(text[end : end + most], n)
    return Draft([], 0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 20))
def test_lookup_is_a_scan_of_the_text(pieces, most):
    ids = list(pieces[0])
    lookup = PromptLookup(ids)
    for piece in [*pieces[1:], []]:
        assert lookup.propose(most) == scanned(ids, most)
        ids += piece


def test_lookup_takes_every_place_once():
    """However often it is asked, an id of the text is looked at as often as there are lengths of n-grams."""

    class Counting(list):
        slices = 0

        def __getitem__(self, key):
            Counting.slices += isinstance(key, slice)
            return super().__getitem__(key)

    ids = Counting(range(100))
    lookup = PromptLookup(ids)
    for i in range(400):
        lookup.propose(5)
        ids.append(1000 + i)
    assert Counting.slices <= len(FIRST_CHANCE) * (len(ids) + 400)


def test_a_longer_match_is_preferred_and_then_the_latest():
    assert PromptLookup([1, 2, 7, 0, 1, 2, 8, 0, 9, 2, 5, 1, 2]).propose(1) == Draft([8], 2)
    assert PromptLookup([1, 2, 3, 4, 5, 6, 3, 4, 7, 1, 2, 3, 4]).propose(2) == Draft([5, 6], 4)
    assert PromptLookup([1, 2, 3]).propose(3) == Draft([], 0)


def test_a_repetition_is_drafted_beyond_the_end_of_the_text():
    assert PromptLookup([5, 6, 7, 5, 6, 7, 5]).propose(8).token_ids == [6, 7, 5, 6, 7, 5, 6, 7]


def speed(counts, offers, cost):
    tokens = sum(sum(p**j for j in range(count + 1)) for count, (_, p) in zip(counts, offers, strict=True))
    return tokens / (1 + cost * (len(offers) + sum(counts) - 1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 0.99)), min_size=1, max_size=3), st.floats(0.001, 1))
def test_no_other_drafts_would_be_faster(offers, cost):
    counts = allot(offers, cost)
    every = itertools.product(*(range(length + 1) for length, _ in offers))
    assert speed(counts, offers, cost) >= max(speed(other, offers, cost) for other in every) * (1 - 1e-9)


def test_how_many_pay():
    assert allot([(15, 0.9)], 0.02) == [15]
    assert allot([(15, 0.2)], 0.25) == [0]
    assert allot([(3, 1.0)], 0.25) == [3]
    assert [allot([(15, 0.8)] * n, 0.25)[0] for n in (1, 4, 12)] == [3, 1, 0]  # the more answers, the fewer drafts
    assert allot([(15, 0.9), (0, 0.0), (15, 0.3)], 0.25)[1:] == [0, 0]
    assert sum(allot([(15, 1.0)] * 5, 0.01)) == MOST_ROWS - 5
    assert allot([(15, 1.0)] * (MOST_ROWS + 1), 0.01) == [0] * (MOST_ROWS + 1)
    assert allot([], 0.25) == []


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_acceptance_learns_the_chance(truth):
    generator, acceptance = torch.Generator().manual_seed(0), Acceptance(0.5)
    found = []
    for _ in range(400):
        hits = (torch.rand(4, generator=generator) < truth).tolist()
        acceptance.note(4, hits.index(False) if False in hits else 4)
        found.append(acceptance.chance)
    assert sum(found[50:]) / 350 == pytest.approx(truth, abs=0.05)


def test_what_failed_is_tried_again_later():
    acceptance, steps = Acceptance(0.5), 0
    for _ in range(50):
        acceptance.note(1, 0)
    assert allot([(1, acceptance.chance)], 0.25) == [0]
    while allot([(1, acceptance.chance)], 0.25) == [0]:
        acceptance.rest()
        steps += 1
    assert 50 < steps < 200


def test_kinds_of_evidence_are_counted_apart():
    class Alternating:
        def propose(self, most):
            self.evidence = 3 - getattr(self, "evidence", 1)
            return Draft([5] * most, self.evidence)

    drafter = Drafter(Alternating(), frozenset())
    for _ in range(20):
        for kept in (0, 2):
            drafter.propose(2)
            drafter.note(2, kept)
    assert drafter.propose(2)[1] < 0.05 and drafter.propose(2)[1] > 0.95
    assert (drafter.drafted, drafter.kept) == (80, 40)


def test_nothing_is_drafted_from_the_end_of_an_answer_on():
    drafter = Drafter(PromptLookup([1, 2, 3, 9, 4, 5, 1, 2]), frozenset({9}))
    assert drafter.propose(6)[0] == [3]
    assert Drafter(PromptLookup([2, 9, 4, 2]), frozenset({9})).propose(6)[0] == []
    assert drafter.propose(0) == drafter.propose(-1) == ([], 0.0)


def test_row_costs():
    assert row_cost("torch") == ROW_COST["torch"] and row_cost("cpu-avx512") == ROW_COST["cpu"]
    assert row_cost("another") == max(ROW_COST.values())


PARAMS = [
    SamplingParams(temperature=0, seed=3),
    SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.7, seed=3),
    SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=4),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.8, presence_penalty=1.0, repetition_penalty=1.2, seed=5),
    SamplingParams(temperature=1.0, logit_bias={3: 2.0}, seed=6),
]


def sequence(params, **fields):
    return Sequence("r", [1, 2, 3], params, frozenset(), 10_000, **fields)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("openings", [[], [[7, 8, 9], [7, 2]]])
@pytest.mark.parametrize("wrong_at", [0, 2, 5])
def test_draws_along_a_draft_are_those_without_one(params, openings, wrong_at):
    rows = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(wrong_at)) * 2
    one_by_one = sequence(params, openings=openings)
    for row in rows:
        (drawn,) = Sampler().sample(row[None], [one_by_one])
        one_by_one.append(drawn.token_ids[0])
    truth = one_by_one.answer_ids
    draft = truth[:5]
    if wrong_at < 5:
        draft[wrong_at] = (draft[wrong_at] + 1) % VOCAB
    others = [sequence(PARAMS[2]), sequence(PARAMS[0])]
    drafted = sequence(params, openings=openings)
    logits = torch.cat([rows[:1], rows, rows[:2]])
    results = Sampler().sample(logits, [others[0], drafted, others[1]], [(), draft, (99,)])
    assert results[1] == Drawn(truth[: wrong_at + 1])
    assert [len(result.token_ids) for result in results] == [1, wrong_at + 1, 1]
    # the noise of what was not drawn is still to come
    spared = sequence(params)
    for row in rows[: wrong_at + 1]:
        Sampler().sample(row[None], [spared])
    assert torch.equal(drafted.generator.get_state(), spared.generator.get_state())


def test_a_bad_row_counts_only_where_the_draft_was_right():
    rows = torch.zeros(3, VOCAB)
    rows[0, 4] = rows[1, 5] = 9.0
    rows[2] = torch.nan
    greedy = sequence(PARAMS[0])
    drawn, error = Sampler().sample(rows, [greedy], [[4, 5]])[0]
    assert drawn == [4, 5] and "NaN" in error.en
    assert Sampler().sample(rows, [greedy], [[4, 6]]) == [Drawn([4, 5])]


def test_the_distribution_is_that_of_the_model():
    """Three ids of a Markov chain, 6,000 times, in as many steps as it takes: chi-square over all 64 outcomes."""
    size, draws = 4, 6000
    generator = torch.Generator().manual_seed(1)
    chain = torch.randn(size, size, generator=generator)
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=2)
    text = Sequence("r", [0], params, frozenset(), 10**6)
    counts, steps = Counter(), 0
    for _ in range(draws):
        ids = [0]
        while len(ids) < 4:
            draft = torch.randint(size, (3 - len(ids),), generator=generator).tolist()
            (drawn,) = Sampler().sample(chain[[ids[-1], *draft]], [text], [draft])
            ids += drawn.token_ids
            steps += 1
        counts[tuple(ids[1:])] += 1
    chances = chain.softmax(-1)
    chi_square = 0.0
    for a, b, c in itertools.product(range(size), repeat=3):
        expected = draws * float(chances[0, a] * chances[a, b] * chances[b, c])
        chi_square += (counts[a, b, c] - expected) ** 2 / expected
    assert chi_square < 104  # 63 degrees of freedom: exceeded by chance once in a thousand
    assert steps < 3 * draws * 0.95

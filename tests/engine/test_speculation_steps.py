"""Steps that draw several ids: where an answer may end, fail or be aborted, and how many ids are drafted."""

import logging
import threading
from dataclasses import replace

import pytest
import torch

from server.core import FinishReason, SamplingParams
from server.engine import local
from server.engine.kv_cache import KVCache
from server.engine.runner import ModelRunner
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.speculation import MOST_ROWS, Draft
from tests.engine.answers import GREEDY, ask, ids_request, read
from tests.engine.doubles import VOCAB, HashNetwork, expected
from tests.engine.reference_engine import reference_engine
from tests.models.reference import OWN


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_limits_end_an_answer_in_the_middle_of_a_step(hashing, told, count):
    told(lambda ids: expected(ids, 60), 1.0)
    engine = hashing(HashNetwork())
    for params in (replace(GREEDY, max_tokens=count), SamplingParams(temperature=0, max_length=count + 2)):
        (answer,) = ask(engine, ids_request([5, 6], params))
        assert (answer.ids, answer.last.finish_reason) == (expected([5, 6], count), FinishReason.LENGTH)
        assert answer.kept == answer.drafted <= count - 1  # the last one needs no draft
        assert count <= 2 or answer.kept


def test_nothing_is_drawn_where_only_the_prompt_is_read(hashing):
    (answer,) = ask(hashing(), ids_request([5, 6, 5, 6, 5], replace(GREEDY, max_tokens=0, prompt_logprobs=1)))
    assert (answer.ids, answer.drafted, answer.last.finish_reason) == ([], 0, FinishReason.LENGTH)


@pytest.mark.parametrize("place", [0, 1, 6, 11])
def test_a_stop_id_in_the_middle_of_a_draft(told, place):
    folder = OWN / "tiny-chatglm2"
    prompt = list(range(3, 20))
    with reference_engine(folder, speculate=0) as (engine, _):
        (plain,) = ask(engine, ids_request(prompt))
    end = plain.ids.index(plain.ids[place])
    told(lambda ids: plain.ids if ids == prompt else [], 1.0)
    with reference_engine(folder, stop_ids=frozenset({plain.ids[place]})) as (engine, reference):
        (answer,) = ask(engine, ids_request(prompt, replace(GREEDY, logprobs=0)))
        assert (answer.ids, answer.last.finish_reason) == (plain.ids[:end], FinishReason.STOP)
        assert answer.last.end.token_id == plain.ids[place]
        follow_up = [*prompt, *answer.ids, 4, 4]
        (next_one,) = ask(engine, ids_request(follow_up, replace(GREEDY, max_tokens=3)))
        assert next_one.ids == reference.conversation().greedy(follow_up, count=3)[0]
        assert next_one.last.usage.cached_tokens == len(follow_up) - 2


def test_a_stop_string_in_the_middle_of_a_draft(hashing, told):
    told(lambda ids: expected(ids, 60), 1.0)
    text = "".join(map(chr, expected([5, 6, 7], 40)))
    stop = text[17:21]
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop, "never"))
    (answer,) = ask(hashing(), ids_request([5, 6, 7], params))
    assert (answer.text, answer.last.finish_reason) == (text[: text.index(stop)], FinishReason.STOP)


def test_an_abort_between_steps_that_draw_many(hashing, told):
    told(lambda ids: expected(ids, 1000), 0.9)
    engine = hashing(slots=1, queue=1, max_length=100_000)
    stream = engine.submit(ids_request([5, 6], SamplingParams(temperature=0)))
    first = stream.get(timeout=10)
    stream.close()
    ids = [*first.token_ids, *(rest := read(stream)).ids]
    assert rest.last.finish_reason is FinishReason.ABORT
    assert ids == expected([5, 6], len(ids)) and len(ids) == rest.last.usage.completion_tokens
    (answer,) = ask(engine, ids_request([5, 6, *ids, 9]))
    assert answer.ids == expected([5, 6, *ids, 9], 24)


@pytest.mark.parametrize("effect", [RuntimeError("boom"), torch.full((VOCAB,), float("nan"))])
def test_a_failure_behind_a_draft_ends_only_its_own_request(hashing, told, effect):
    """The id that cannot be read is drafted, and the step fails before the answer has come to it."""
    told(lambda ids: expected(ids, 60), 1.0)
    prompts = [[9, 4], [8, 2], [8, 5]]
    answers = [expected(prompt, 24) for prompt in prompts]
    (bad,) = {answers[1][9]} - {*answers[0], *answers[2], *answers[1][:9]}
    network = HashNetwork({bad: effect})
    gate = network.script[30] = threading.Event()
    engine = hashing(network, slots=4)
    holding = engine.submit(ids_request([30], replace(GREEDY, max_tokens=2)))
    streams = [engine.submit(ids_request(prompt)) for prompt in prompts]
    gate.set()
    got = [read(stream) for stream in streams]
    assert [got[0].ids, got[2].ids] == [answers[0], answers[2]]
    assert got[1].last.finish_reason is FinishReason.ERROR and got[1].last.error.en
    assert got[1].ids == answers[1][:10]
    assert read(holding).ids == expected([30], 2)
    (after,) = ask(engine, ids_request([8, 2, *got[1].ids[:5], 6]))
    assert after.ids == expected([8, 2, *got[1].ids[:5], 6], 24)


def test_a_draft_that_cannot_be_computed_harms_nobody(hashing, told):
    """Wrong ids whose reading fails: the answer needs none of them."""
    told(lambda ids: [i + 1 for i in expected(ids, 60)], 1.0)
    wanted = expected([5, 6], 24)
    (poison, *_) = {i + 1 for i in wanted} - set(wanted)
    (answer,) = ask(hashing(HashNetwork({poison: RuntimeError("boom")})), ids_request([5, 6]))
    assert answer.ids == wanted and answer.drafted > 0 == answer.kept


def test_a_step_that_is_run_again_draws_with_the_same_noise():
    params = SamplingParams(temperature=8.0, top_k=0, top_p=1.0, seed=1)

    def run(*others):
        cache = KVCache(HashNetwork.kv_shape, 3, 32, torch.float32, "cpu")
        sequences = [Sequence("r", [4, 5], params, frozenset(), 32), *others]
        for slot, sequence in enumerate(sequences):
            sequence.slot, sequence.num_computed = slot, 0
        runner = ModelRunner(HashNetwork(), cache, "cpu")
        return runner.run([Work(sequence, 2, [9, 9]) for sequence in sequences])

    def other(**fields):
        return Sequence("r", [4, 5], replace(params, **fields), frozenset(), 32)

    (alone,) = run()
    assert len(alone.token_ids) == 1
    together = run(other(logit_bias={VOCAB: 1.0}), other())  # an id that no engine would let through
    assert [together[0], together[2]] == [alone, alone]
    assert together[1].token_ids == [] and together[1].error.en


def rows(network):
    """Of the steps that read no prompt, per sequence."""
    return [length for step in network.steps[1:] for length in step]


def test_drafts_end_where_they_never_pay_and_come_back_where_they_do(hashing, told):
    told(lambda ids: expected(ids, 600), 0.0)
    long = SamplingParams(temperature=0, max_tokens=300)
    network = HashNetwork()
    (wrong,) = ask(hashing(network, row_cost=0.25, max_length=400), ids_request([5, 6], long))
    assert wrong.ids == expected([5, 6], 300)
    assert 2 < wrong.drafted < 20 and rows(network)[-30:].count(1) >= 28
    told(lambda ids: [1] * 100 + expected(ids, 600)[100:], 1.0)
    network = HashNetwork()
    (late,) = ask(hashing(network, row_cost=0.25, max_length=400), ids_request([5, 6], long))
    assert late.ids == wrong.ids and late.kept > 120
    told(lambda ids: expected(ids, 600), 1.0)
    network = HashNetwork()
    (right,) = ask(hashing(network, row_cost=0.25, max_length=400), ids_request([5, 6], long))
    assert right.ids == wrong.ids and len(network.steps) < 300 / 8


def test_many_answers_share_the_rows_of_a_step(hashing, told):
    told(lambda ids: expected(ids, 60), 0.9)
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    engine = hashing(network, slots=10, queue=10, prefill_chunk=64)
    prompts = [[3] * 20 + [i] for i in range(40, 50)]
    streams = [engine.submit(ids_request(prompt)) for prompt in prompts]
    gate.set()
    assert [read(stream).ids for stream in streams] == [expected(prompt, 24) for prompt in prompts]
    answering = [step for step in network.steps if len(step) == 10 and max(step) <= 10]
    assert max(map(sum, answering)) == MOST_ROWS and max(map(max, answering)) > 1


def test_most_per_answer_and_none(hashing, told):
    told(lambda ids: expected(ids, 60), 1.0)
    for most, longest in ((3, 4), (0, 1)):
        network = HashNetwork()
        (answer,) = ask(hashing(network, speculate=most), ids_request([5, 6]))
        assert answer.ids == expected([5, 6], 24) and max(rows(network)) == longest


def test_the_log_says_what_became_of_the_drafts(hashing, told, caplog):
    told(lambda ids: expected(ids, 60), 0.8)
    with caplog.at_level(logging.INFO):
        engine = hashing()
        (answer,) = ask(engine, ids_request([5, 6]))
        engine.close()
    assert f"{answer.kept} of {answer.drafted} drafted tokens kept" in caplog.text and answer.kept


def test_a_proposer_may_say_nothing(hashing, monkeypatch):
    class Silent:
        def propose(self, most):
            return Draft([], 0)

    monkeypatch.setattr(local, "PromptLookup", lambda ids: Silent())
    (answer,) = ask(hashing(), ids_request([5, 6]))
    assert (answer.ids, answer.drafted) == (expected([5, 6], 24), 0)

"""Log probabilities of prompts and answers, against the network's own logits read in one piece."""

import math

import pytest
import torch

from server.core import FinishReason, GenerationRequest, SamplingParams
from server.engine.logprobs import score
from server.errors import BadRequest
from tests.engine.doubles import EOS, VOCAB, HashNetwork, make_engine
from tests.engine.reference_engine import reference_engine
from tests.models.reference import OWN

FOLDER = OWN / "tiny-chatglm2"
PROMPT = tuple(range(3, 20))


def ask(engine, prompt=PROMPT, **params):
    """(tokens, their logprobs, the prompt's, the last output) of an answer."""
    stream = engine.submit(GenerationRequest(prompt_ids=tuple(prompt), params=SamplingParams(**params)))
    outputs = list(stream)
    tokens = [i for output in outputs for i in output.token_ids]
    logprobs = [entry for output in outputs for entry in output.logprobs]
    prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    assert len(prompts) == (params.get("prompt_logprobs") is not None)
    return tokens, logprobs, prompts[0] if prompts else (), outputs[-1]


def wanted(reference, ids):
    """Log probabilities [len(ids), vocab] of what follows each id."""
    return reference.conversation().feed(list(ids))[0].log_softmax(dim=-1)


def check(entries, rows, tops):
    """``entries`` against the rows [n, vocab] that predict them."""
    assert len(entries) == len(rows)
    for entry, row in zip(entries, rows, strict=True):
        assert entry.data == b"%d" % entry.token_id
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        values, ids = row.topk(tops)
        assert [top.token_id for top in entry.top] == ids.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_answer_and_prompt():
    with reference_engine(FOLDER) as (engine, reference):
        for _ in range(2):  # the second time a slot holds the whole prompt, which must not lose its scores
            tokens, logprobs, prompt, last = ask(
                engine, temperature=0, max_tokens=7, logprobs=3, prompt_logprobs=2, repetition_penalty=1.3
            )
            rows = wanted(reference, [*PROMPT, *tokens])
            assert len(tokens) == 7 and [entry.token_id for entry in logprobs] == tokens
            check(logprobs, rows[len(PROMPT) - 1 : -1], 3)
            assert [entry.token_id for entry in prompt] == list(PROMPT)
            assert prompt[0].logprob is None and prompt[0].top == ()
            check(prompt[1:], rows[: len(PROMPT) - 1], 2)
            assert last.usage.cached_tokens == 0


def test_only_what_was_asked_for():
    with reference_engine(FOLDER) as (engine, _):
        tokens, logprobs, prompt, _ = ask(engine, temperature=0, max_tokens=3)
        assert len(tokens) == 3 and logprobs == [] and prompt == ()
        _, logprobs, prompt, last = ask(engine, temperature=0, max_tokens=3, logprobs=0)
        assert [entry.top for entry in logprobs] == [()] * 3 and prompt == ()
        assert last.usage.cached_tokens == len(PROMPT) - 1


def test_a_prompt_can_be_scored_without_an_answer():
    with reference_engine(FOLDER) as (engine, reference):
        tokens, logprobs, prompt, last = ask(engine, max_tokens=0, logprobs=1, prompt_logprobs=1)
        assert (tokens, logprobs, last.finish_reason) == ([], [], FinishReason.LENGTH)
        check(prompt[1:], wanted(reference, PROMPT)[:-1], 1)
        _, _, one, _ = ask(engine, prompt=[5], max_tokens=0, prompt_logprobs=1)
        assert [(entry.token_id, entry.logprob) for entry in one] == [(5, None)]


def test_beside_other_requests():
    """Work with and without scores shares the steps."""
    with reference_engine(FOLDER) as (engine, reference):
        others = [
            engine.submit(GenerationRequest(prompt_ids=PROMPT[:9], params=SamplingParams(temperature=0, max_tokens=9)))
            for _ in range(3)
        ]
        tokens, logprobs, prompt, _ = ask(engine, temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1)
        rows = wanted(reference, [*PROMPT, *tokens])
        check(logprobs, rows[len(PROMPT) - 1 : -1], 2)
        check(prompt[1:], rows[: len(PROMPT) - 1], 1)
        answers = [[i for output in stream for i in output.token_ids] for stream in others]
        assert answers == [reference.conversation().greedy(list(PROMPT[:9]), count=9)[0]] * 3


def test_the_token_that_ends_an_answer_has_one_too():
    network = HashNetwork({66: torch.zeros(VOCAB).index_fill(0, torch.tensor([EOS]), 9.0)})
    engine = make_engine(network)
    try:
        tokens, logprobs, _, last = ask(engine, prompt=[66], temperature=0, logprobs=1)
        assert (tokens, logprobs, last.finish_reason) == ([], [], FinishReason.STOP)
        assert (last.end.token_id, last.end.top[0].token_id) == (EOS, EOS)
        assert last.end.logprob == pytest.approx(-math.log1p((VOCAB - 1) * math.exp(-9)), abs=1e-6)
        tokens, _, _, last = ask(engine, prompt=[66], temperature=0)
        assert (tokens, last.end) == ([], None)
        stop = chr(ask(engine, prompt=[5], temperature=0, max_tokens=1)[0][0])
        assert ask(engine, prompt=[5], temperature=0, logprobs=0, stop=(stop,))[3].end is None
        assert ask(engine, prompt=[5], temperature=0, logprobs=0, max_tokens=2)[3].end is None
    finally:
        engine.close()


def test_more_alternatives_than_there_are_tokens():
    (found,) = score(torch.tensor([[0.0, 1.0]]), [0], 5)
    assert [i for i, _ in found.top] == [1, 0] and found.logprob == found.top[1][1]


def test_a_prompt_that_is_read_in_both_directions_has_none():
    engine = make_engine(causal_prompt=False)
    try:
        with pytest.raises(BadRequest) as caught:
            ask(engine, prompt_logprobs=0)
        assert caught.value.param == "logprobs"
        assert len(ask(engine, prompt=[5], max_tokens=2, logprobs=0)[1]) == 2
    finally:
        engine.close()

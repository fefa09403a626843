"""What a request may ask for beyond an answer: bias, openings, raw prompts, tools; and freeing the caches."""

import pytest
import torch

from server.core import GenerationRequest, Message, SamplingParams, Tool, ToolCall
from server.engine.sampler import Sampler, adjust
from server.engine.sequence import Drawn, Sequence
from server.errors import BadRequest, Unavailable
from server.models.base import Shown
from tests.engine.doubles import VOCAB, HashNetwork, PlainFamily, expected, make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8)
TOOL = Tool("f")


class CallingFamily(PlainFamily):
    """Every answer that begins with the call's opening is a call of that tool with the rest as arguments."""

    takes_tools = True

    def build_prompt(self, tokenizer, messages, answer_prefix="", tools=()):
        offered = "".join(tool.name for tool in tools)
        return tokenizer.encode(offered) + super().build_prompt(tokenizer, messages, answer_prefix)

    def call_openings(self, tokenizer, names):
        return [tokenizer.encode(f"<{name}>") for name in names]

    def display_calls(self, text, names, *, final, continued=False):
        name, _, rest = text[1:].partition(">")
        return Shown("", (ToolCall(name, rest),) if final else ())


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


@pytest.fixture
def calling():
    engine = make_engine(family=CallingFamily())
    yield engine
    engine.close()


def ids_of(stream):
    return [i for output in stream for i in output.token_ids]


def test_logit_bias_forces_and_forbids(engine):
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={65: 100.0})
    assert ids_of(engine.submit(GenerationRequest(prompt_ids=(5, 6), params=forced))) == [65] * 5
    first = expected([5, 6], 1)[0]
    forbidden = SamplingParams(temperature=1, top_k=0, top_p=1, max_tokens=1, logit_bias={first: -100.0})
    assert first not in ids_of(engine.submit(GenerationRequest(prompt_ids=(5, 6), params=forbidden)))


def test_logit_bias_comes_before_the_penalties():
    params = SamplingParams(logit_bias={1: 3.0}, repetition_penalty=2.0)
    row = adjust(torch.tensor([1.0, -1.0, 0.5]), Sequence("r", [1], params, frozenset(), 99))
    assert row.tolist() == [1.0, 1.0, 0.5]


def test_a_bias_outside_the_vocabulary(engine):
    with pytest.raises(BadRequest) as caught:
        engine.submit(GenerationRequest(prompt_ids=(5,), params=SamplingParams(logit_bias={VOCAB: 1.0})))
    assert caught.value.param == "logit_bias" and str(VOCAB - 1) in caught.value.en


@pytest.mark.parametrize("temperature", [0, 1, 100])
def test_an_opening_is_kept_and_what_follows_is_free(temperature):
    openings = [[7, 8, 9], [7, 9]]
    for seed in range(20):
        params = SamplingParams(temperature=temperature, top_k=0, top_p=1, seed=seed)
        sequence = Sequence("r", [1], params, frozenset({0}), 99, openings=openings)
        while sequence.allowed_ids():
            sequence.append(Sampler().sample(torch.randn(1, 20), [sequence])[0].token_ids[0])
        assert sequence.answer_ids in openings
        assert Sampler().sample(torch.arange(20.0)[None], [sequence]) == [Drawn([19])] or temperature


def test_a_raw_prompt_is_continued_as_it_is():
    class Stripping(PlainFamily):
        def display(self, text, *, final, continued=False):
            return text.strip().upper()

    space = torch.full((VOCAB,), -50.0).index_fill(0, torch.tensor([32]), 50.0)
    engine = make_engine(HashNetwork({ord("b"): space}), family=Stripping())
    try:
        params = SamplingParams(temperature=0, max_tokens=3)
        stream = engine.submit(GenerationRequest(prompt="ab", params=params))
        assert stream.prompt_ids == (97, 98)
        outputs = list(stream)
        text = "".join(output.text for output in outputs)
        assert text == "".join(map(chr, ids_of(outputs))) and text.startswith(" ")
        answer = engine.submit(GenerationRequest(messages=(Message("user", "ab"),), params=params))
        assert (shown := "".join(output.text for output in answer)) == shown.strip().upper()
    finally:
        engine.close()


def test_a_call_comes_whole_and_without_text(calling):
    request = GenerationRequest(messages=(Message("user", "?"),), tools=(TOOL,), tool_choice=("f",), params=GREEDY)
    stream = calling.submit(request)
    assert bytes(stream.prompt_ids) == b"f?\n"
    outputs = list(stream)
    assert "".join(output.text for output in outputs) == ""
    (call,) = [call for output in outputs for call in output.tool_calls]
    assert call.name == "f" and len(call.arguments) == GREEDY.max_tokens - len("<f>")


def test_a_forced_call_behind_an_answer_prefix(calling):
    with pytest.raises(BadRequest) as caught:
        calling.submit(
            GenerationRequest(
                messages=(Message("user", "?"),), tools=(TOOL,), tool_choice=("f",), answer_prefix="Well"
            )
        )
    assert caught.value.param == "tool_choice"


def test_tools_for_a_model_that_cannot_call_any(engine):
    with pytest.raises(BadRequest) as caught:
        engine.submit(GenerationRequest(messages=(Message("user", "?"),), tools=(TOOL,)))
    assert caught.value.param == "tools" and "ChatGLM3" in caught.value.zh and "ChatGLM3" in caught.value.en


def test_freed_caches_are_read_again(engine):
    def cached():
        outputs = list(engine.submit(GenerationRequest(prompt_ids=(5, 6, 7, 8), params=GREEDY)))
        return outputs[-1].usage.cached_tokens

    assert [cached(), cached()] == [0, 3]
    engine.free_caches()
    assert [cached(), cached()] == [0, 3]


def test_caches_can_be_freed_while_an_answer_runs(engine):
    params = SamplingParams(temperature=0, max_tokens=40)
    stream = engine.submit(GenerationRequest(prompt_ids=(5, 6), params=params))
    ids = list(stream.get().token_ids)
    engine.free_caches()
    assert ids + ids_of(stream) == expected([5, 6], 40)



def test_embedding_without_a_sentence_model(engine):
    with pytest.raises(Unavailable):
        engine.embed(["a"])

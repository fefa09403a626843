"""ChatGLM3's calls through the whole engine: its own prompt, tokenizer and parser, and a network that says a script."""

from types import SimpleNamespace

import pytest
import torch

from server.core import FinishReason, GenerationRequest, Message, SamplingParams, Tool, ToolCall
from server.engine.local import EngineSettings, LocalEngine
from server.models.base import KVShape
from server.models.chatglm2.prompt import ChatGLM3
from tests.oracle import ROOT

FAMILY = ChatGLM3()
TOKENIZER = FAMILY.load_tokenizer(ROOT / "THUDM" / "demo")
SPECIAL = TOKENIZER.special_ids
TOOLS = (Tool("get", "reads a page"), Tool("get_weather", "天气"))
QUESTION = (Message("system", "Be brief."), Message("user", "天气？"))
CALL = ToolCall("get_weather", '{"city": "北京 👋", "days": 3}')


class ScriptedNetwork:
    """Says the ids of ``script`` and nothing else, one at each position of the answer, then <|observation|>."""

    kv_shape = KVShape(layers=1, groups=1, head_dim=1)
    vocab_size = TOKENIZER.vocab_size

    def __init__(self, script):
        self.script = [*script, SPECIAL["<|observation|>"]]
        self.answer_starts = 0

    def context(self, prompt_ids):
        return None

    def forward(self, batch, cache):
        (segment,) = batch.segments  # one request, whose prompt is one chunk
        end = segment.start + segment.length
        self.answer_starts = end if segment.length > 1 else self.answer_starts
        logits = torch.full((1, self.vocab_size), -50.0)
        logits[0, self.script[end - self.answer_starts]] = 50.0
        return logits


def ask(script, **fields):
    model = SimpleNamespace(
        name="chatglm3",
        family=FAMILY,
        tokenizer=TOKENIZER,
        network=ScriptedNetwork(script),
        dtype=torch.float32,
        device="cpu",
        prefix=None,
    )
    engine = LocalEngine(model, EngineSettings(max_length=2000, slots=1, queue=1, prefill_chunk=2000))
    try:
        params = SamplingParams(temperature=0.8)
        stream = engine.submit(GenerationRequest(messages=QUESTION, tools=TOOLS, params=params, **fields))
        return stream, list(stream)
    finally:
        engine.close()


def as_answer(*calls):
    """The ids of an answer that asks for these calls."""
    return FAMILY.build_prompt(TOKENIZER, [Message("assistant", "", calls)])[3:-1]


def calls_of(outputs):
    return [call for output in outputs for call in output.tool_calls]


def test_the_tools_are_in_the_prompt():
    stream, _ = ask([])
    assert list(stream.prompt_ids) == FAMILY.build_prompt(TOKENIZER, QUESTION, tools=TOOLS)
    text = TOKENIZER.decode(stream.prompt_ids)
    assert '"name": "get_weather"' in text and "Be brief." in text


@pytest.mark.parametrize("unwilling", ["<|user|>", "sop"])
def test_a_forced_call_comes_out_whatever_the_model_would_have_begun_with(unwilling):
    ids = as_answer(CALL)
    (opening,) = FAMILY.call_openings(TOKENIZER, [CALL.name])
    script = [SPECIAL[unwilling]] * len(opening) + ids[len(opening) :]
    _, outputs = ask(script, tool_choice=(CALL.name,))
    assert [i for output in outputs for i in output.token_ids] == ids
    assert "".join(output.text for output in outputs) == ""
    assert calls_of(outputs) == [CALL]
    assert outputs[-1].finish_reason is FinishReason.STOP
    _, free = ask(script)
    assert calls_of(free) == []


def test_text_and_two_calls_that_the_model_chose_itself():
    script = [*TOKENIZER.encode("\n"), *TOKENIZER.encode("我查一下"), SPECIAL["<|assistant|>"]]
    other = ToolCall("get", '{"a-b": null}')
    _, outputs = ask([*script, *as_answer(CALL, other)])
    assert "".join(output.text for output in outputs) == "我查一下"
    assert calls_of(outputs) == [CALL, other]
    first_call = next(i for i, output in enumerate(outputs) if output.tool_calls)
    assert not any(output.text for output in outputs[first_call:])


def test_a_call_that_was_cut_short_is_text():
    script = as_answer(ToolCall("get", '{"page": "abc"}'))[:-6]
    _, outputs = ask(script)
    assert calls_of(outputs) == []
    assert "".join(output.text for output in outputs) == TOKENIZER.decode(script).strip() != ""

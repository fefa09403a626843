"""ChatGLM3's calls through the whole engine: its own prompt, tokenizer and parser, and a network that says a script."""

import contextlib
from types import SimpleNamespace

import openai
import pytest
import torch

from server.core import FinishReason, GenerationRequest, Message, SamplingParams, Tool, ToolCall
from server.engine.local import EngineSettings, LocalEngine
from server.models.base import KVShape
from server.models.chatglm2.prompt import ChatGLM3
from tests.functional.live import serve
from tests.oracle import ROOT

FAMILY = ChatGLM3()
TOKENIZER = FAMILY.load_tokenizer(ROOT / "THUDM" / "demo")
SPECIAL = TOKENIZER.special_ids
TOOLS = (Tool("get", "reads a page"), Tool("get_weather", "天气"))
QUESTION = (Message("system", "Be brief."), Message("user", "天气？"))
CALL = ToolCall("get_weather", '{"city": "北京 👋", "days": 3}')


class ScriptedNetwork:
    """Says the ids of ``script`` and nothing else, one at each position of the answer, then <|observation|>.

    To a tool's result it says ``closing``.
    """

    kv_shape = KVShape(layers=1, groups=1, head_dim=1)
    vocab_size = TOKENIZER.vocab_size

    def __init__(self, script, closing=()):
        self.scripts = [[*ids, SPECIAL["<|observation|>"]] for ids in (script, closing)]
        self.answer_starts = 0
        self.told = False

    def context(self, prompt_ids):
        return None

    def forward(self, batch, cache):
        (segment,) = batch.segments  # one request, whose prompt is one chunk
        end = segment.start + segment.length
        if segment.length > 1:
            self.answer_starts = end
            self.told = SPECIAL["<|observation|>"] in batch.token_ids.tolist()
        logits = torch.full((1, self.vocab_size), -50.0)
        logits[0, self.scripts[self.told][end - self.answer_starts]] = 50.0
        return logits


@contextlib.contextmanager
def running(*scripts):
    model = SimpleNamespace(
        name="chatglm3",
        family=FAMILY,
        tokenizer=TOKENIZER,
        network=ScriptedNetwork(*scripts),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device="cpu",
        prefix=None,
    )
    engine = LocalEngine(model, EngineSettings(max_length=2000, slots=1, queue=1, prefill_chunk=2000, speculate=0))
    try:
        yield engine
    finally:
        engine.close()


def ask(script, **fields):
    with running(script) as engine:
        params = SamplingParams(temperature=0.8)
        stream = engine.submit(GenerationRequest(messages=QUESTION, tools=TOOLS, params=params, **fields))
        return stream, list(stream)


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


LINES = [*TOKENIZER.encode("\n"), *TOKENIZER.encode("第一行。\n第二行。")]


@pytest.mark.parametrize(
    ("script", "stop", "text", "calls"),
    [
        (LINES, "\n", "第一行。", []),  # not the metadata line's end
        (LINES, "二行", "第一行。\n第", []),
        (LINES, "<|assistant|>", "第一行。\n第二行。", []),
        (as_answer(CALL), "\n", "", [CALL]),
        (as_answer(CALL), "tool_call", "", [CALL]),
        ([*TOKENIZER.encode("\n"), *TOKENIZER.encode("[[训练时间]]成立")], "2023年", "", []),
    ],
)
def test_stop_strings_are_looked_for_in_what_is_shown(script, stop, text, calls):
    for tools in (TOOLS, ()):
        with running(script) as engine:
            params = SamplingParams(temperature=0, stop=("never", stop))
            request = GenerationRequest(messages=QUESTION, tools=tools, params=params)
            outputs = list(engine.submit(request))
        if tools or not calls:
            assert ("".join(output.text for output in outputs), calls_of(outputs)) == (text, calls)
        assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("streamed", [False, True])
def test_a_round_trip_of_openais_client(streamed):
    """Over HTTP: the tools in, the call out, its result in, the answer out."""
    closing = [*TOKENIZER.encode("\n"), *TOKENIZER.encode("北京三天都是晴天。")]
    tools = [{"type": "function", "function": {"name": tool.name, "parameters": {}}} for tool in TOOLS]
    messages = [{"role": "user", "content": "天气？"}]
    with running(as_answer(CALL), closing) as engine, serve(engine) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)

        def answer():
            fields = {"model": "chatglm3-6b", "messages": messages, "tools": tools}
            if not streamed:
                return client.chat.completions.create(**fields).choices[0]
            with client.chat.completions.stream(**fields) as stream:
                return stream.get_final_completion().choices[0]

        asked = answer()
        (call,) = asked.message.tool_calls
        assert asked.finish_reason == "tool_calls" and not asked.message.content
        assert ToolCall(call.function.name, call.function.arguments) == CALL
        messages += [asked.message, {"role": "tool", "tool_call_id": call.id, "content": "晴"}]
        told = answer()
        assert (told.finish_reason, told.message.content) == ("stop", "北京三天都是晴天。")

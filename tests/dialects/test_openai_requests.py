"""What OpenAI's dialect asks of the engine."""

import pytest

from server.core import Message, SamplingParams, Tool, ToolCall
from tests.dialects.recorded import client_of
from tests.fake_engine import FakeEngine

QUESTION = [{"role": "user", "content": "q"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def asked(path=CHAT, **fields):
    """What the engine is asked for these fields."""
    engine = FakeEngine("a")
    base = {"messages": QUESTION} if path == CHAT else {"prompt": "p"}
    response = client_of(engine).post(path, json=base | fields)
    assert response.status_code == 200, response.data.decode()
    return engine.requests[0] if len(engine.requests) == 1 else engine.requests


def test_defaults_are_the_engines_own():
    request = asked()
    assert request.params == SamplingParams()
    assert request.messages == (Message("user", "q"),) and request.client == "127.0.0.1"
    assert (request.prompt, request.prompt_ids, request.answer_prefix) == (None, (), "")
    request = asked(TEXT)
    assert request.params == SamplingParams(max_tokens=16) and request.prompt == "p" and not request.messages


FIELDS = [
    ({"temperature": 0, "top_p": "0.5", "top_k": 3}, {"temperature": 0, "top_p": 0.5, "top_k": 3}),
    ({"top_k": -1, "repetition_penalty": 1.5}, {"top_k": 0, "repetition_penalty": 1.5}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2, "frequency_penalty": 2}),
    ({"stop": "a"}, {"stop": ("a",)}),
    ({"stop": ["a", "", "你"]}, {"stop": ("a", "你")}),
    ({"stop": "", "seed": 5}, {"stop": (), "seed": 5}),
    ({"seed": -1}, {"seed": 2**63 - 1}),
    ({"max_length": 100, "max_tokens": 5}, {"max_length": 100, "max_tokens": 5}),
    ({"max_tokens": -1}, {"max_tokens": None}),
    ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100, 7: 1.5}}),
    (dict.fromkeys(("temperature", "stop", "seed", "logit_bias", "logprobs", "n", "stream_options", "model")), {}),
    ({"user": "u", "metadata": {}, "store": True, "num_beams": [{}], "parallel_tool_calls": False}, {}),
]


@pytest.mark.parametrize(("fields", "params"), FIELDS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_sampling_fields(path, fields, params):
    default = {} if path == CHAT else {"max_tokens": 16}
    assert asked(path, **fields).params == SamplingParams(**{**default, **params})


def test_newer_name_of_max_tokens_wins():
    assert asked(max_tokens=5, max_completion_tokens=7).params.max_tokens == 7
    assert asked(max_completion_tokens=-1, max_tokens=5).params.max_tokens is None


def test_logprobs_of_a_chat_are_asked_by_two_fields():
    assert asked(logprobs=True).params.logprobs == 0
    assert asked(logprobs=True, top_logprobs=20).params.logprobs == 20
    assert asked(logprobs=False, top_logprobs=0).params.logprobs is None


ROLES = [
    {"role": "developer", "content": "d"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "d", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "r"},
    {"role": "assistant", "content": "t", "function_call": {"name": "h", "arguments": "{}"}},
    {"role": "function", "name": "h", "content": "s"},
]


def test_roles_and_contents():
    assert asked(messages=ROLES).messages == (
        Message("system", "d"),
        Message("user", "a\nb"),
        Message("assistant", "", (ToolCall("f", '{"x": 1}'), ToolCall("g", "{}"))),
        Message("observation", "r"),
        Message("assistant", "t", (ToolCall("h", "{}"),)),
        Message("observation", "s"),
    )


@pytest.mark.parametrize("flags", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_a_trailing_assistant_message_is_the_answer_prefix(flags):
    request = asked(messages=[*QUESTION, {"role": "assistant", "content": "当然"}], **flags)
    assert request.messages == (Message("user", "q"),) and request.answer_prefix == "当然"
    assert asked(messages=[*QUESTION, {"role": "assistant", "content": ""}]).answer_prefix == ""


TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "查询_1.x-y"}},
]
OURS = (Tool("f", "d", {"type": "object"}), Tool("查询_1.x-y"))
CHOICES = [
    ({}, OURS, ()),
    ({"tool_choice": "auto"}, OURS, ()),
    ({"tool_choice": "none"}, (), ()),
    ({"tool_choice": "required"}, OURS, ("f", "查询_1.x-y")),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, OURS, ("f",)),
]


@pytest.mark.parametrize(("fields", "tools", "wanted"), CHOICES)
def test_tools(fields, tools, wanted):
    request = asked(tools=TOOLS, **fields)
    assert (request.tools, request.tool_choice) == (tools, wanted)


def test_functions_of_older_clients():
    functions = [tool["function"] for tool in TOOLS]
    for choice, tools, wanted in (("auto", OURS, ()), ("none", (), ()), ({"name": "f"}, OURS, ("f",))):
        request = asked(functions=functions, function_call=choice)
        assert (request.tools, request.tool_choice) == (tools, wanted)


def test_choices_that_need_no_tools():
    for choice in ("none", "auto"):
        assert asked(tools=[], tool_choice=choice).tools == ()


def test_seeds_of_several_answers_follow_each_other():
    assert [request.params.seed for request in asked(n=3, seed=2**63 - 2)] == [2**63 - 2, 2**63 - 1, 0]
    assert [request.params.seed for request in asked(n=2)] == [None, None]
    seeds = [(request.prompt, request.params.seed) for request in asked(TEXT, prompt=["a", "b"], n=2, seed=7)]
    assert seeds == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]


PROMPTS = [
    ("a", [("a", ())]),
    (["a", "", "你"], [("a", ()), ("", ()), ("你", ())]),
    ([5, 6], [(None, (5, 6))]),
    ([[5, 6], [7]], [(None, (5, 6)), (None, (7,))]),
]


@pytest.mark.parametrize(("prompt", "wanted"), PROMPTS)
def test_prompts(prompt, wanted):
    engine = FakeEngine("a")
    response = client_of(engine).post(TEXT, json={"prompt": prompt})
    assert [(request.prompt, request.prompt_ids) for request in engine.requests] == wanted
    assert [choice["index"] for choice in response.json["choices"]] == list(range(len(wanted)))


ECHOES = [
    ({"prompt": "a", "logprobs": 5}, 5, None),
    ({"prompt": "a", "echo": True}, None, None),
    ({"prompt": "a", "echo": True, "logprobs": 0, "max_tokens": 0}, 0, 0),
    ({"prompt": [5], "echo": True}, None, None),
    ({"prompt": [5], "echo": True, "logprobs": 2}, 2, 2),
]


@pytest.mark.parametrize(("fields", "logprobs", "prompt_logprobs"), ECHOES)
def test_echo_and_logprobs_of_a_text(fields, logprobs, prompt_logprobs):
    params = asked(TEXT, **fields).params
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)
    assert params.max_tokens == fields.get("max_tokens", 16)


def test_echoed_ids_are_the_models_text_of_them():
    engine = FakeEngine("a")
    fields = {"prompt": [[5], [6]], "echo": True}
    assert [choice["text"] for choice in client_of(engine).post(TEXT, json=fields).json["choices"]] == ["<prompt>a"] * 2
    stream = client_of(engine).post(TEXT, json={**fields, "stream": True}).data.decode()
    assert stream.count('"<prompt>a"') == 2


def test_best_of_may_repeat_n():
    assert len(asked(TEXT, n=2, best_of=2)) == 2

"""OpenAI's dialect, byte by byte, and what it asks of the engine."""

import json
from dataclasses import replace

import pytest

from server.api.app import create_app
from server.api.chatlog import open_chat_log
from server.api.dialect import ApiSettings
from server.api.dialects.openai import models, reply
from server.core import FinishReason, Message, RequestOutput, SamplingParams, TokenLogprob, Tool, ToolCall, Usage
from server.errors import ContextOverflow, GenerationFailed, Overloaded, Unavailable
from tests.dialects import recorded
from tests.fake_engine import FakeEngine

QUESTION = [{"role": "user", "content": "q"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

FAILURE = GenerationFailed("显存不足。", "Out of memory.")
REFUSALS = {
    "chat_too_long": ContextOverflow("输入有 9000 个 token。", "The input has 9000 tokens; 2047 are allowed."),
    "chat_overloaded": Overloaded("服务器已满。", "The server is full.", retry_after=7),
    "embeddings_unavailable": Unavailable("没有向量模型。", "There is no embedding model."),
}


def token(token_id, data, logprob=-0.25, top=()):
    data = data.encode() if isinstance(data, str) else data
    return TokenLogprob(token_id, data, logprob, tuple(top))


def said(*tokens, text=None, **more):
    """An output of these tokens."""
    text = b"".join(t.data for t in tokens).decode() if text is None else text
    return RequestOutput(text=text, token_ids=tuple(t.token_id for t in tokens), logprobs=tokens, **more)


def ended(reason=FinishReason.STOP, **more):
    return RequestOutput(finish_reason=reason, usage=Usage(9, 3, 4), **more)


NI = token(54591, "你", -0.5, [token(54591, "你", -0.5), token(36474, "好", -1.5)])
# three bytes of an emoji and the last one: no text before the last
HALF = token(240, b"\xf0\x9f\x98", -2.0, [token(7, b"\xf0\x9f", -1.0), token(8, b"\xf0\x9f", -3.0)])
REST = token(128, b"\x80", -0.125, [token(128, b"\x80", -0.125), token(2, b"", float("-inf"))])
WORDS = (said(NI), said(HALF, text=""), said(REST, text="😀"))
WEATHER = ToolCall("get_weather", '{"city": "北京"}')
TIME = ToolCall("get_time", "{}")
PROMPT = (token(64790, b"", None), token(30910, b" ", -9.5, [token(5, " a", -1.0)]), token(13, "山", -0.75))

SCRIPTS = {
    "failure": ("半", FAILURE),
    "logprobs": (*WORDS, ended(FinishReason.LENGTH)),
    "token_ids": (*(replace(word, logprobs=()) for word in WORDS), ended(FinishReason.LENGTH)),
    "tools": (RequestOutput(text="查"), RequestOutput(tool_calls=(WEATHER,)), ended(tool_calls=(TIME,))),
    "functions": (RequestOutput(tool_calls=(WEATHER,)), ended()),
    "echo": (said(NI, prompt_logprobs=PROMPT), ended(FinishReason.LENGTH)),
    "score": (ended(FinishReason.LENGTH, prompt_logprobs=PROMPT),),
    "interrupted": ("半", ended(FinishReason.ABORT)),
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    for module in (reply, models):
        monkeypatch.setattr(module, "now", lambda: 1700000000)


def client_of(engine, **settings):
    return create_app(engine, ApiSettings(**settings)).test_client()


def post(engine, path=CHAT, **fields):
    return client_of(engine, language="en").post(path, json=fields, buffered=True)


def chat(*script, **fields):
    """The body of an answer or its events, parsed but for the last."""
    response = post(FakeEngine(*script), **{"messages": QUESTION, **fields})
    return events(response) if fields.get("stream") else response.json


def events(response):
    parts = response.data.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: {") for part in parts[:-2])
    return [json.loads(part[6:]) for part in parts[:-2]]


def asked(path=CHAT, **fields):
    """What the engine is asked for these fields."""
    engine = FakeEngine("a")
    response = post(engine, path, **({"messages": QUESTION} if path == CHAT else {"prompt": "p"}) | fields)
    assert response.status_code == 200, response.data.decode()
    return engine.requests[0] if len(engine.requests) == 1 else engine.requests


def engine_for(name):
    kind = next((kind for kind in SCRIPTS if kind in name), None)
    engine = FakeEngine(*SCRIPTS.get(kind, ("你", "好\n", '😀"')))
    engine.refuse = REFUSALS.get(name)
    return engine


@pytest.mark.parametrize("path", recorded.requests("openai"), ids=lambda path: path.stem)
def test_bytes(path):
    assert recorded.send(client_of(engine_for(path.stem)), path) == recorded.expected(path)


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


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_holds_what_follows_the_prefix_however_it_is_cut(stream):
    prefix = {"role": "assistant", "content": "当然，"}
    for script in (("好",), (), ("好", "的")):
        for echo in (False, True):
            found = chat(*script, messages=[*QUESTION, prefix], stream=stream, echo=echo)
            if stream:
                text = "".join(e["choices"][0]["delta"].get("content", "") for e in found)
            else:
                text = found["choices"][0]["message"]["content"]
            assert text == "当然，" * echo + "".join(script)


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


def test_tool_calls_have_ids_of_their_own_in_streams_and_whole_answers():
    script = (RequestOutput(tool_calls=(WEATHER,)), RequestOutput(tool_calls=(TIME,)), ended())
    whole = [choice["message"]["tool_calls"] for choice in chat(*script, tools=TOOLS, n=2)["choices"]]
    streamed = [[], []]
    for event in chat(*script, tools=TOOLS, n=2, stream=True):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["delta"].get("tool_calls", [])
    assert [[call.pop("index") for call in calls] for calls in streamed] == [[0, 1], [0, 1]]
    assert streamed == whole
    ids = {call["id"] for calls in whole for call in calls}
    assert len(ids) == 4 and all(len(i) <= 40 for i in ids)


def test_older_clients_hear_of_one_call():
    script = (RequestOutput(tool_calls=(WEATHER,)), RequestOutput(tool_calls=(TIME, TIME)), ended())
    functions = [tool["function"] for tool in TOOLS]
    message = chat(*script, functions=functions)["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in chat(*script, functions=functions, stream=True)]
    called = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert called == [message["function_call"]] == [{"name": WEATHER.name, "arguments": WEATHER.arguments}]


def test_an_answer_cut_short_says_length_even_after_a_tool_call():
    script = (RequestOutput(tool_calls=(WEATHER,)), ended(FinishReason.LENGTH))
    assert chat(*script, tools=TOOLS)["choices"][0]["finish_reason"] == "length"


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
    response = post(engine, TEXT, prompt=prompt)
    assert [(request.prompt, request.prompt_ids) for request in engine.requests] == wanted
    assert [choice["index"] for choice in response.json["choices"]] == list(range(len(wanted)))


ECHOES = [
    ({"prompt": "a", "logprobs": 5}, 5, None),
    ({"prompt": "a", "echo": True}, None, None),
    ({"prompt": "a", "echo": True, "logprobs": 0, "max_tokens": 0}, 0, 0),
    ({"prompt": [5], "echo": True}, None, 0),  # only so is the text of ids known
    ({"prompt": [5], "echo": True, "logprobs": 2}, 2, 2),
]


@pytest.mark.parametrize(("fields", "logprobs", "prompt_logprobs"), ECHOES)
def test_echo_and_logprobs_of_a_text(fields, logprobs, prompt_logprobs):
    params = asked(TEXT, **fields).params
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, prompt_logprobs)
    assert params.max_tokens == fields.get("max_tokens", 16)


def test_best_of_may_repeat_n():
    assert len(asked(TEXT, n=2, best_of=2)) == 2


def test_streamed_prompts_are_counted_once_each():
    response = post(FakeEngine("a"), TEXT, prompt=["x", "y"], n=2, stream=True, stream_options={"include_usage": True})
    *_, last = (json.loads(e[6:]) for e in response.data.decode().split("\n\n") if e.startswith("data: {"))
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (14, 4)


def test_embedding_of_the_models_own_width():
    assert post(FakeEngine(), "/v1/embeddings", input="a", dimensions=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_request_id_and_retry_after(stream):
    engine = FakeEngine("a")
    response = post(engine, messages=QUESTION, stream=stream)
    assert response.headers["X-Request-Id"] == "request-1" and "chatcmpl-request-1" in response.data.decode()
    engine.refuse = REFUSALS["chat_overloaded"]
    assert post(engine, messages=QUESTION, stream=stream).headers["Retry-After"] == "7"


@pytest.mark.parametrize(("path", "fields"), [(CHAT, {"messages": QUESTION}), (TEXT, {"prompt": "q"})])
def test_chat_log(tmp_path, path, fields):
    chat_log = open_chat_log(tmp_path / "chat.log")
    client = client_of(FakeEngine("你", "好"), chat_log=chat_log)
    for stream in (False, True):
        client.post(path, json={**fields, "n": 2, "stream": stream}, buffered=True).close()
    chat_log.close()
    lines = [json.loads(line) for line in (tmp_path / "chat.log").read_text("utf-8").splitlines()]
    assert [(line["query"], line["answer"], line["finish_reason"]) for line in lines] == [("q", "你好", "stop")] * 4


def test_preflight_of_browser_clients():
    names = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
    response = client_of(FakeEngine()).options(
        CHAT,
        headers={
            "Origin": "http://a",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": names,
        },
    )
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Headers"] == names.replace(",", ", ")
    assert response.headers["Access-Control-Allow-Origin"] in ("*", "http://a")


def test_unknown_paths_below_v1_are_refused_in_this_shape():
    client = client_of(FakeEngine(), language="en")
    for response in (client.get("/v1"), client.post("/v1/responses", json={})):
        error = response.json["error"]
        assert response.status_code == 404 and (error["type"], error["code"]) == ("invalid_request_error", "not_found")
        assert "/v1/chat/completions" in error["message"]
    assert client.get("/v10").json["success"] is False


def test_models_by_ids_with_slashes():
    engine = FakeEngine()
    engine.model_name = "THUDM/demo"
    client = client_of(engine)
    for path in ("/v1/models/THUDM/demo", "/v1/models/THUDM%2Fdemo", "/v1/models/fake-text2vec"):
        assert client.get(path).json["object"] == "model"

"""OpenAI's dialect, byte by byte, and what else its clients hear."""

import json
from dataclasses import replace

import pytest

from server.api.chatlog import open_chat_log
from server.api.dialects.openai import models, reply
from server.core import FinishReason, RequestOutput, TokenLogprob, ToolCall, Usage
from server.errors import ContextOverflow, GenerationFailed, Overloaded, Unavailable
from tests.dialects import recorded
from tests.dialects.recorded import client_of
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
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("get_weather", "get_time")]
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


class Engine(FakeEngine):
    """PROMPT's ids are given as a text without the space, as a real tokenizer does."""

    def submit(self, request):
        stream = super().submit(request)
        stream.prompt_text = "山"
        return stream


def engine_for(name):
    kind = next((kind for kind in SCRIPTS if kind in name), None)
    engine = Engine(*SCRIPTS.get(kind, ("你", "好\n", '😀"')))
    engine.refuse = REFUSALS.get(name)
    return engine


@pytest.mark.parametrize("path", recorded.requests("openai"), ids=lambda path: path.stem)
def test_bytes(path):
    assert recorded.send(client_of(engine_for(path.stem)), path) == recorded.expected(path)


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


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_token_is_scored_in_text_completions_alone(stream):
    """lm-evaluation-harness asks for one token more than it scores, whatever that is, and drops its entry."""
    script = (said(NI), ended(end=token(2, b"", -0.5)))
    response = post(FakeEngine(*script), TEXT, prompt="p", logprobs=0, stream=stream)
    lines = [line.removeprefix("data: ") for line in response.data.decode().splitlines()]
    parts = [json.loads(line)["choices"][0]["logprobs"] for line in lines if line.startswith("{")]
    assert [value for part in parts for value in part["token_logprobs"]] == [-0.5, -0.5]
    assert [text for part in parts for text in part["tokens"]] == ["你", ""]
    assert len(chat(*script, logprobs=True)["choices"][0]["logprobs"]["content"]) == 1


def test_an_answer_cut_short_says_length_even_after_a_tool_call():
    script = (RequestOutput(tool_calls=(WEATHER,)), ended(FinishReason.LENGTH))
    assert chat(*script, tools=TOOLS)["choices"][0]["finish_reason"] == "length"


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

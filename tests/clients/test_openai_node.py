"""OpenAI's own client for Node."""

import base64
import threading

import pytest

from server.core import FinishReason, RequestOutput, ToolCall, Usage
from server.errors import GenerationFailed, Overloaded
from tests.fake_engine import FakeEngine
from tests.functional.live import serve, wait_for

ASK = {"model": "gpt-3.5-turbo", "messages": [{"role": "user", "content": "你是谁？"}]}
GREEDY = {**ASK, "temperature": 0}


@pytest.fixture
def openai(node):
    """``openai(port, function, *args)`` calls a function of openai.js."""
    return lambda port, function, *args: node("openai.js", function, f"http://127.0.0.1:{port}", *args)


@pytest.fixture
def failure(node):
    """The facts of the error with which such a call ends."""
    return lambda port, name, fields: node("openai.js", "failure", name, f"http://127.0.0.1:{port}", fields)


def text_of(chunks) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def test_models(program, openai):
    assert openai(program.port, "models")[0] == "demo"
    assert openai(program.port, "model", "demo")["object"] == "model"


def test_an_answer_and_its_stream(program, openai):
    whole = openai(program.port, "chat", GREEDY)
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == program.ask("你是谁？") and choice["finish_reason"] == "stop"
    streamed = openai(program.port, "chatStream", {**GREEDY, "stream_options": {"include_usage": True}})
    assert streamed["error"] is None and len(streamed["chunks"]) > 5
    assert text_of(streamed["chunks"]) == choice["message"]["content"]
    assert streamed["chunks"][-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 5


def test_the_helper_for_streams_puts_the_same_together(program, openai):
    fields = {**ASK, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = openai(program.port, "chat", fields)["choices"]
    helped = openai(program.port, "streamHelper", fields)["choices"]
    assert len(whole) == 2
    for mine, theirs in zip(helped, whole, strict=True):
        assert mine["message"]["content"] == theirs["message"]["content"]
        assert mine["finish_reason"] == theirs["finish_reason"]
        tokens = mine["logprobs"]["content"]
        assert [token["bytes"] for token in tokens] == [token["bytes"] for token in theirs["logprobs"]["content"]]
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_prompts_of_token_ids(program, openai):
    chat = openai(program.port, "chat", {**GREEDY, "return_token_ids": True})["choices"][0]
    fields = {"model": "m", "prompt": chat["prompt_token_ids"], "temperature": 0, "max_tokens": len(chat["token_ids"])}
    whole = openai(program.port, "complete", fields)["choices"][0]["text"]
    assert whole.strip() == chat["message"]["content"]
    streamed = openai(program.port, "completeStream", fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed["chunks"]) == whole


def test_embeddings_by_default_and_as_asked(openai):
    fields = {"model": "text-embedding-3-small", "input": ["a", "你好"]}
    expected = [pytest.approx([1, 0.1]), pytest.approx([2, 0.1])]
    with serve(FakeEngine()) as port:
        for more in ({}, {"encoding_format": "float"}):  # by default the client asks for base64 and decodes it
            answer = openai(port, "embed", {**fields, **more})
            assert [item["embedding"] for item in answer["data"]] == expected
        (item,) = openai(port, "embed", {"model": "m", "input": "a", "encoding_format": "base64"})["data"]
        assert len(base64.b64decode(item["embedding"])) == 2 * 4


def test_a_client_that_aborts_frees_its_slot(openai):
    engine = FakeEngine("半", threading.Event(), capacity=1)
    with serve(engine) as port:
        assert openai(port, "leave", ASK) == "半"
        wait_for(engine.streams[0].closed.is_set)
        engine.script = ("好",)
        assert openai(port, "chat", ASK)["choices"][0]["message"]["content"] == "好"


def test_tools_are_run_and_their_results_answered(openai):
    class Weather(FakeEngine):
        def submit(self, request):
            call = RequestOutput(tool_calls=(ToolCall("get_weather", '{"city": "北京"}'),))
            end = RequestOutput(finish_reason=FinishReason.STOP, usage=Usage(7, 5))
            asked = request.messages[-1]
            self.script = (f"好，{asked.content}。",) if asked.role == "observation" else ("查一下。", call, end)
            return super().submit(request)

    engine = Weather()
    with serve(engine) as port:
        for stream in (False, True):
            done = openai(port, "runTools", {**ASK, "stream": stream})
            assert (done["text"], done["asked"]) == ("好，北京：晴。", ["北京"])
            assert done["roles"] == ["user", "assistant", "tool", "assistant"]
    assert engine.requests[0].tools[0].name == "get_weather"


def test_a_failure_in_mid_stream_is_an_error_with_its_sentence(openai):
    with serve(FakeEngine("半", GenerationFailed("显存不足。", "Out of memory."))) as port:
        streamed = openai(port, "chatStream", ASK)
    assert text_of(streamed["chunks"]) == "半"
    assert streamed["error"]["isAPIError"] and "Out of memory." in streamed["error"]["message"]
    assert streamed["error"]["code"] == "generation_failed"


def test_errors_are_those_of_its_classes(program, failure):
    bad = failure(program.port, "chat", {**ASK, "temperature": 3})
    assert (bad["kind"], bad["status"], bad["param"], bad["type"]) == (
        "BadRequestError",
        400,
        "temperature",
        "invalid_request_error",
    )
    assert "temperature must be a number of at least 0 and at most 2, but 3 was given." in bad["message"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    unable = failure(program.port, "chat", {**ASK, "tools": tools})
    assert (unable["kind"], unable["param"]) == ("BadRequestError", "tools") and "ChatGLM3" in unable["message"]
    long = failure(program.port, "chat", {**ASK, "messages": [{"role": "user", "content": "很长" * 5000}]})
    assert (long["kind"], long["code"]) == ("BadRequestError", "context_length_exceeded")
    assert failure(program.port, "model", "gpt-9")["kind"] == "NotFoundError"
    nowhere = failure(program.port, "respond", {"model": "m", "input": "a"})
    assert nowhere["kind"] == "NotFoundError" and "/v1/responses" in nowhere["message"]


def test_a_full_server_is_a_server_error(failure):
    engine = FakeEngine()
    engine.refuse = Overloaded("满。", "The server is full.", retry_after=1)
    with serve(engine) as port:
        full = failure(port, "chat", ASK)
    assert (full["kind"], full["status"]) == ("InternalServerError", 503) and "The server is full." in full["message"]

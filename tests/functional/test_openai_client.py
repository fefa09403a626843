"""OpenAI's own Python client against the dialect /v1, over a real server with a scripted engine."""

import asyncio
import json
import threading

import openai
import pytest

from server.api.dialects.openai import reply
from server.core import FinishReason, RequestOutput, ToolCall, Usage
from server.errors import GenerationFailed, Overloaded
from tests.fake_engine import FakeEngine
from tests.functional.live import Streaming, request, serve, wait_for

QUESTION = [{"role": "user", "content": "你是谁？"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
WEATHER = ToolCall("get_weather", '{"city": "北京"}')
FAILURE = GenerationFailed("显存不足。", "Out of memory.")


def client_at(port, kind=openai.OpenAI, **options):
    options = {"api_key": "anything", "max_retries": 0, "timeout": 60, **options}
    return kind(base_url=f"http://127.0.0.1:{port}/v1", **options)


class Fake:
    """A client, the engine that it talks to, and how."""

    def __init__(self, port, engine):
        self.port, self.engine = port, engine
        self.client = client_at(port, default_headers={"Accept-Language": "en"})

    def says(self, *script):
        self.engine.script = script

    def chat(self, **fields):
        return self.client.chat.completions.create(model="gpt-3.5-turbo", messages=QUESTION, **fields)


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine()
    with serve(engine) as port:
        yield Fake(port, engine)


@pytest.fixture
def fake(server):
    server.says("你", "好")
    server.engine.refuse = None
    server.engine.requests.clear()
    server.engine.streams.clear()
    return server


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_typed_answer(fake):
    raw = fake.client.chat.completions.with_raw_response.create(model="gpt-3.5-turbo", messages=QUESTION)
    assert raw.headers["content-type"] == "application/json; charset=utf-8" and raw.headers["x-request-id"]
    answer = raw.parse()
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    assert (answer.object, answer.model) == ("chat.completion", "fake-chatglm") and answer.created > 1.6e9
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "你好", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 2, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    # nothing in it that the client's types do not know or would not take
    openai.types.chat.ChatCompletion.model_validate(answer.model_dump(), strict=True)


def test_stream(fake):
    chunks = list(fake.chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.content for chunk in chunks[:3]] == ["", "你", "好"]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[3].choices[0].finish_reason == "stop"
    assert [chunk.usage is None for chunk in chunks] == [True] * 4 + [False]
    assert chunks[4].choices == [] and chunks[4].usage.completion_tokens == 2
    assert len({chunk.id for chunk in chunks}) == 1
    for chunk in chunks:
        openai.types.chat.ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)


def test_stream_helper(fake):
    with fake.client.chat.completions.stream(model="m", messages=QUESTION) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == "你好"
    assert [event.content for event in events if event.type == "content.done"] == ["你好"]
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == ("你好", "stop")


def test_several_answers_at_once(fake):
    assert [choice.index for choice in fake.chat(n=3).choices] == [0, 1, 2]
    with fake.client.chat.completions.stream(model="m", messages=QUESTION, n=3) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["你好"] * 3


def test_async_client(fake):
    async def main():
        client = client_at(fake.port, openai.AsyncOpenAI)
        ask = client.chat.completions.create
        whole = await asyncio.gather(*(ask(model="m", messages=QUESTION) for _ in range(3)))
        stream = await ask(model="m", messages=QUESTION, stream=True)
        streamed = [chunk.choices[0].delta.content or "" async for chunk in stream]
        await client.close()
        return [answer.choices[0].message.content for answer in whole], "".join(streamed)

    assert asyncio.run(main()) == (["你好"] * 3, "你好")


def test_tool_calls(fake):
    usage = Usage(7, 5)
    fake.says(
        "查一下。",
        RequestOutput(tool_calls=(WEATHER,)),
        RequestOutput(finish_reason=FinishReason.STOP, usage=usage),
    )
    whole = fake.chat(tools=TOOLS).choices[0]
    with fake.client.chat.completions.stream(model="m", messages=QUESTION, tools=TOOLS) as stream:
        streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content == "查一下。"
        assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
            "function",
            "get_weather",
            {"city": "北京"},
        )
    # and back again, as the client's own types put it
    result = {"role": "tool", "tool_call_id": call.id, "content": "晴"}
    fake.client.chat.completions.create(model="m", messages=[*QUESTION, whole.message, result], tools=TOOLS)
    _, assistant, observation = fake.engine.requests[-1].messages
    assert (assistant.content, assistant.tool_calls) == ("查一下。", (WEATHER,))
    assert (observation.role, observation.content) == ("observation", "晴")


def test_function_call_of_older_clients(fake):
    fake.says(RequestOutput(tool_calls=(WEATHER,)), RequestOutput(finish_reason=FinishReason.STOP, usage=Usage()))
    choice = fake.chat(functions=[TOOLS[0]["function"]]).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.content is None
    assert choice.message.function_call.name == "get_weather" and choice.message.tool_calls is None
    fake.client.chat.completions.create(
        model="m",
        messages=[*QUESTION, choice.message, {"role": "function", "name": "get_weather", "content": "晴"}],
    )
    assert fake.engine.requests[-1].messages[1].tool_calls == (WEATHER,)


def test_embeddings(fake):
    default = fake.client.embeddings.create(model="text-embedding-ada-002", input=["a", "你好"])
    plain = fake.client.embeddings.create(model="m", input=["a", "你好"], encoding_format="float")
    assert default.model == "fake-text2vec" and default.usage.total_tokens == 3
    assert [item.embedding for item in default.data] == [item.embedding for item in plain.data]
    assert [item.embedding for item in plain.data] == [pytest.approx([1, 0.1]), pytest.approx([2, 0.1])]


def test_models(fake):
    listed = [model.id for model in fake.client.models.list()]
    assert listed == ["fake-chatglm", "gpt-3.5-turbo", "fake-text2vec"]
    assert all(fake.client.models.retrieve(name).id == name for name in listed)
    with pytest.raises(openai.NotFoundError) as caught:
        fake.client.models.retrieve("THUDM/chatglm-6b")
    assert caught.value.code == "model_not_found"


def test_bad_requests(fake):
    with pytest.raises(openai.BadRequestError) as caught:
        fake.chat(temperature=3)
    error = caught.value
    assert (error.param, error.type, error.code) == ("temperature", "invalid_request_error", "invalid_request")
    assert error.body["message"] == "temperature must be a number of at least 0 and at most 2, but 3 was given."
    with pytest.raises(openai.BadRequestError, match=r"response_format\.type"):
        fake.chat(response_format={"type": "json_object"})
    with pytest.raises(openai.NotFoundError, match="There is no /v1/responses"):
        fake.client.responses.create(model="m", input="a")


def test_a_full_server_is_tried_again(fake):
    fake.engine.refuse = Overloaded("满。", "The server is full.", retry_after=1)
    with pytest.raises(openai.InternalServerError, match="The server is full") as caught:
        fake.chat()
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"

    def relieve():
        fake.engine.refuse = None

    threading.Timer(0.5, relieve).start()
    answer = fake.client.with_options(max_retries=3).chat.completions.create(model="m", messages=QUESTION)
    assert answer.choices[0].message.content == "你好"


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_in_mid_stream_is_an_exception_with_its_sentence(fake, n):
    fake.says("半", FAILURE)
    said = []
    with pytest.raises(openai.APIError, match=r"Out of memory\.") as caught:
        for chunk in fake.chat(stream=True, n=n):
            said.append(chunk.choices[0].delta.content)
    assert said == [""] * n + ["半"] * n and caught.value.code == "generation_failed"
    with pytest.raises(openai.InternalServerError, match=r"Out of memory\."):
        fake.chat(n=n)


def test_completions(fake):
    answer = fake.client.completions.create(model="m", prompt=["a", "b"])
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, "你好", "stop"),
        (1, "你好", "stop"),
    ]
    openai.types.Completion.model_validate(answer.model_dump(), strict=True)
    chunks = list(fake.client.completions.create(model="m", prompt="a", stream=True, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "a你好"


def test_comments_keep_the_connection_alive_and_disturb_nobody(fake, monkeypatch):
    monkeypatch.setattr(reply, "REPEAT", 0.02)
    fake.says(0.6, "好", 0.6)
    with Streaming(fake.port, "/v1/chat/completions", messages=QUESTION, stream=True) as client:
        client.read_all()
        chunks = client.chunks()
    assert chunks.count(b": ping\n\n") >= 2 and chunks[-1] == b"data: [DONE]\n\n"
    assert all(chunk.startswith(b"data: {") for chunk in chunks[:-1] if chunk != b": ping\n\n")
    assert text_of(fake.chat(stream=True)) == "好"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_headers_come_before_the_first_token(fake, path):
    first_token = threading.Event()
    fake.says(first_token, "好")
    with Streaming(fake.port, path, messages=QUESTION, prompt="a", stream=True) as client:
        head = client.read_until(b"\n\n")
        assert b"Content-Type: text/event-stream" in head and not first_token.is_set()
        first_token.set()
        assert b"[DONE]" in client.read_all()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_all_its_answers(fake, stream):
    fake.says("好", threading.Event())
    with Streaming(fake.port, "/v1/chat/completions", messages=QUESTION, n=2, stream=stream) as client:
        wait_for(lambda: len(fake.engine.streams) == 2)
        if stream:
            client.read_until("好".encode())
    wait_for(lambda: all(stream.closed.is_set() for stream in fake.engine.streams))


def test_an_interrupted_stream_ends_as_usual(fake):
    fake.says("好", threading.Event())
    stream = fake.chat(stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "好"]
    request(fake.port, path="/interrupt")
    (last,) = stream
    assert last.choices[0].finish_reason == "stop"


def test_what_the_web_server_finds_is_said_in_this_shape_too(fake):
    head = {"Accept-Language": "en"}
    for path, message in (("/v1/embeddings", "error"), ("/generate", "message")):
        status, _, body = request(fake.port, path=path, body=b" " * (9 << 20), headers=head)
        assert status == 413 and message in json.loads(body)
    with pytest.raises(openai.APIStatusError, match="larger than the limit of 8 MiB") as caught:
        fake.client.embeddings.create(model="m", input="a" * (9 << 20))
    assert caught.value.status_code == 413

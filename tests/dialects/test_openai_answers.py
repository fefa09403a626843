"""Many answers to one request: in order, at the same time, in half of the slots, and none left behind."""

import json
import threading

import pytest

from server.api.app import create_app
from server.api.dialect import ApiSettings, Call
from server.api.dialects.openai.answers import Answers, joined
from server.core import FinishReason, GenerationRequest, RequestOutput, TokenLogprob, ToolCall, Usage
from server.errors import ContextOverflow, GenerationFailed, Overloaded, ShuttingDown
from tests.fake_engine import FakeEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FULL = Overloaded("满", "full")
FAILURE = GenerationFailed("坏", "bad")
TOO_LONG = ContextOverflow("长", "long")
WAYS = pytest.mark.parametrize("stream", [False, True])


class Engine(FakeEngine):
    """Follows a script for each prompt; raises those of ``refusals``, which begin with the first submit."""

    def __init__(self, *, scripts=None, refusals=(), slots=4, capacity=100):
        super().__init__(slots=slots, capacity=capacity)
        self.scripts = scripts or {}
        self.refusals = list(refusals)
        self.most = 0

    def submit(self, request):
        if self.refusals and (refusal := self.refusals.pop(0)):
            raise refusal
        self.script = self.scripts.get(request.prompt, (request.prompt or "a",))
        stream = super().submit(request)
        self.most = max(self.most, sum(not s.ended for s in self.streams))
        return stream

    @property
    def all_closed(self):
        return all(stream.ended and stream.closed.is_set() for stream in self.streams)


def post(engine, path, stream, environ=None, **fields):
    """The status and the body of a whole response, or the events of a stream."""
    client = create_app(engine, ApiSettings(language="en")).test_client()
    response = client.post(path, json={**fields, "stream": stream}, environ_overrides=environ or {})
    data = response.data.decode()
    response.close()
    if response.content_type.startswith("application/json"):
        return response.status_code, json.loads(data)
    return response.status_code, [line[6:] for line in data.split("\n") if line.startswith("data: ")]


def texts(engine, *prompts, stream=False, **fields):
    """What was said to each prompt; raises the error's sentence."""
    status, found = post(engine, TEXT, stream, prompt=list(prompts), **fields)
    if isinstance(found, dict):
        assert status == 200, found["error"]["message"]
        assert [choice["index"] for choice in found["choices"]] == list(range(len(found["choices"])))
        return [choice["text"] for choice in found["choices"]]
    said = {}
    for event in map(json.loads, found[:-1]):
        for choice in event["choices"]:
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    assert found[-1] == "[DONE]", found[-1]
    return [said[index] for index in sorted(said)]


@WAYS
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_any_number_is_answered_in_order_in_half_of_the_slots(slots, stream):
    scripts = {str(i): (0.01 * (i % 3), str(i), 0.001, "!") for i in range(20)}
    engine = Engine(scripts=scripts, slots=slots)
    assert texts(engine, *scripts, stream=stream) == [f"{i}!" for i in range(20)]
    assert engine.most == max(1, slots // 2)


@WAYS
def test_the_answers_of_a_chat_take_half_of_the_slots(stream):
    engine = Engine(slots=4)
    messages = [{"role": "user", "content": "q"}]
    status, found = post(engine, CHAT, stream, messages=messages, n=36, stream_options={"include_usage": True})
    assert status == 200 and engine.most == 2 and len(engine.requests) == 36
    if stream:
        events = [json.loads(event) for event in found[:-1]]
        roles = [choice["index"] for event in events for choice in event["choices"] if "role" in choice["delta"]]
        assert sorted(roles) == list(range(36))
        usage = events[-1]["usage"]
    else:
        usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 36)


@WAYS
def test_a_place_that_becomes_free_is_used_though_an_older_answer_goes_on(stream):
    last_started = threading.Event()
    engine = Engine(scripts={"slow": (last_started, "done")}, slots=4)
    submit = engine.submit

    def watching_submit(request):
        if request.prompt == "last":
            last_started.set()
        return submit(request)

    engine.submit = watching_submit
    assert texts(engine, "slow", "a", "b", "last", stream=stream) == ["done", "a", "b", "last"]


@WAYS
def test_only_the_first_is_refused_when_the_engine_is_full_and_the_others_wait(stream):
    status, found = post(Engine(refusals=[FULL]), TEXT, stream, prompt=["a", "b"])
    assert (status, found["error"]["code"]) == (503, "overloaded")
    engine = Engine(refusals=[None, FULL, FULL], slots=2)
    assert texts(engine, "a", "b", "c", stream=stream) == ["a", "b", "c"]


def test_two_requests_for_many_answers_share_the_engine():
    engine = Engine(capacity=1)
    found = {}

    def work(name):
        try:
            found[name] = texts(engine, *[f"{name}{i}" for i in range(10)])
        except AssertionError:
            work(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {name: [f"{name}{i}" for i in range(10)] for name in "ab"}


def test_a_server_that_stops_is_not_waited_for():
    engine = Engine(refusals=[None, FULL, ShuttingDown()], slots=2)
    status, found = post(engine, TEXT, False, prompt=["a", "b"])
    assert (status, found["error"]["code"]) == (503, "shutting_down")
    engine = Engine(refusals=[None, FULL, ShuttingDown()], slots=2)
    status, events = post(engine, TEXT, True, prompt=["a", "b"])
    assert status == 200 and json.loads(events[-1])["error"]["code"] == "shutting_down"


@WAYS
def test_an_error_ends_all(stream):
    engine = Engine(scripts={"a": (threading.Event(),), "b": ("x", FAILURE)})
    with pytest.raises(AssertionError, match="bad"):
        texts(engine, "a", "b", "c", stream=stream)
    assert len(engine.streams) == 2 and engine.all_closed


@WAYS
def test_all_of_the_first_are_started_or_none(stream):
    engine = Engine(scripts={"a": (threading.Event(),)}, refusals=[None, TOO_LONG])
    status, found = post(engine, TEXT, stream, prompt=["a", "b", "c"])
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
    assert len(engine.streams) == 1 and engine.streams[0].closed.is_set()


@WAYS
def test_a_client_that_leaves_ends_all(stream):
    engine = Engine(scripts=dict.fromkeys("abc", (threading.Event(),)))
    left = {"waitress.client_disconnected": lambda: len(engine.streams) == 2}
    post(engine, TEXT, stream, left, prompt=["a", "b", "c"])
    assert len(engine.streams) == 2 and engine.all_closed


@WAYS
def test_a_client_that_leaves_while_others_have_all_the_room_is_not_kept(stream):
    left = threading.Event()

    class Full(Engine):
        def submit(self, request):
            if len(self.streams) == 2:
                left.set()
                raise FULL
            return super().submit(request)

    engine = Full(slots=2)
    post(engine, TEXT, stream, {"waitress.client_disconnected": left.is_set}, prompt=["a", "b", "c"])
    assert len(engine.streams) == 2 and engine.all_closed


@WAYS
def test_an_interruption_keeps_what_there_is_unless_prompts_are_left(stream):
    cut = ("ha", RequestOutput(finish_reason=FinishReason.ABORT))
    engine = Engine(scripts={"a": cut}, slots=4)
    assert texts(engine, "a", "b", stream=stream) == ["ha", "b"]
    with pytest.raises(AssertionError, match="interrupted"):
        texts(engine, "a", "b", "c", "d", stream=stream)


def test_what_has_ended_is_given_back_at_once():
    """The engine's part of an answer may be large."""
    engine = Engine(slots=4, scripts={"a": ("x",), "b": (threading.Event(),)})
    call = Call(engine=engine, settings=ApiSettings(), client="", language="en", gone=lambda: False)
    answers = Answers(call, [GenerationRequest(prompt=prompt) for prompt in "ab"])
    while 0 in answers.running:
        list(answers.read())
    assert list(answers.running) == [1] and engine.streams[0].closed.is_set()
    assert answers.usages == [Usage(7, 1), Usage()]
    answers.end()
    assert answers.over and engine.all_closed


def test_a_slow_answer_does_not_hold_up_another():
    never = threading.Event()
    engine = Engine(scripts={"a": (never,), "b": ("x", 0.01) * 20})
    call = Call(engine=engine, settings=ApiSettings(), client="", language="en", gone=lambda: False)
    answers = Answers(call, [GenerationRequest(prompt=prompt) for prompt in "ab"])
    said = []
    while len(answers.running) == 2:
        said += answers.read()
    assert {index for index, _ in said} == {1} and joined([output for _, output in said]).text == "x" * 20
    answers.end()


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_client_that_is_behind_gets_fewer_events_with_more_in_each(path):
    fields = {"messages": [{"role": "user", "content": "q"}]} if path == CHAT else {"prompt": "q"}
    for script, ending in ((("a", 0.01, "b", "c"), "[DONE]"), (("a", "b", "c", FAILURE), None)):
        for behind, count in ((False, 3), (True, 1)):
            environ = {"chatglm.client_behind": lambda behind=behind: behind}
            _, events = post(FakeEngine(*script), path, True, environ, **fields)
            choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
            pieces = list(filter(None, (c.get("text") or c.get("delta", {}).get("content") for c in choices)))
            assert "".join(pieces) == "abc" and len(pieces) == count
            assert ending is None or events[-1] == ending


def test_outputs_joined_are_one_output():
    one, two = TokenLogprob(1, b"a", -1.0), TokenLogprob(2, b"b", -2.0)
    call = ToolCall("f", "{}")
    outputs = [
        RequestOutput("a", (1,), (one,), prompt_logprobs=(two,)),
        RequestOutput("b", (2,), (two,), (call,)),
        RequestOutput(finish_reason=FinishReason.LENGTH, usage=Usage(1, 2)),
    ]
    assert joined(outputs) == RequestOutput(
        "ab", (1, 2), (one, two), (call,), (two,), FinishReason.LENGTH, Usage(1, 2)
    )
    assert joined([]) == RequestOutput()

"""Many answers to one request: in order, at the same time, as room allows, and none left behind."""

import threading

import pytest

from server.api.dialect import ApiSettings, Call
from server.api.dialects.openai.answers import joined, news, read_all, start_all, still_running
from server.core import FinishReason, GenerationRequest, RequestOutput, TokenLogprob, ToolCall, Usage
from server.errors import GenerationFailed, Overloaded
from tests.fake_engine import FakeEngine

FULL = Overloaded("满", "full")
FAILURE = GenerationFailed("坏", "bad")


class Engine(FakeEngine):
    """Follows a script for each prompt; raises those of ``refusals``, which begin with the first submit."""

    def __init__(self, *, scripts=None, refusals=(), capacity=4):
        super().__init__(capacity=capacity)
        self.scripts = scripts or {}
        self.refusals = list(refusals)
        self.most = 0

    def submit(self, request):
        if self.refusals and (refusal := self.refusals.pop(0)):
            raise refusal
        self.script = self.scripts.get(request.prompt, (request.prompt,))
        stream = super().submit(request)
        self.most = max(self.most, sum(not s.ended for s in self.streams))
        return stream


def call_of(engine, gone=lambda: False):
    return Call(engine=engine, settings=ApiSettings(), client="", language="en", gone=gone)


def requests(*prompts):
    return [GenerationRequest(prompt=prompt) for prompt in prompts]


def texts(engine, *prompts):
    return [output.text for _, output in read_all(call_of(engine), requests(*prompts))]


@pytest.mark.parametrize("capacity", [1, 2, 3, 8])
def test_any_number_is_answered_in_order_in_half_of_the_room(capacity):
    scripts = {str(i): (0.01 * (i % 3), str(i), 0.001, "!") for i in range(20)}
    engine = Engine(scripts=scripts, capacity=capacity)
    assert texts(engine, *scripts) == [f"{i}!" for i in range(20)]
    assert engine.most == max(1, capacity // 2)


def test_a_place_that_becomes_free_is_used_though_an_older_answer_goes_on():
    last_started = threading.Event()
    engine = Engine(scripts={"slow": (last_started, "done")}, capacity=4)
    submit = engine.submit

    def watching_submit(request):
        if request.prompt == "last":
            last_started.set()
        return submit(request)

    engine.submit = watching_submit
    assert texts(engine, "slow", "a", "b", "last") == ["done", "a", "b", "last"]


def test_only_the_first_is_refused_when_the_engine_is_full_and_the_others_wait():
    with pytest.raises(Overloaded):
        texts(Engine(refusals=[FULL]), "a", "b")
    engine = Engine(refusals=[None, FULL, FULL], capacity=2)
    assert texts(engine, "a", "b", "c") == ["a", "b", "c"]


def test_two_requests_for_many_answers_share_the_engine():
    engine = Engine(capacity=1)
    found = {}

    def work(name):
        try:
            found[name] = texts(engine, *[f"{name}{i}" for i in range(10)])
        except Overloaded:
            work(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {name: [f"{name}{i}" for i in range(10)] for name in "ab"}


def test_an_error_ends_all():
    engine = Engine(scripts={"a": (threading.Event(),), "b": ("x", FAILURE)})
    with pytest.raises(GenerationFailed) as caught:
        texts(engine, "a", "b", "c")
    assert caught.value is FAILURE
    assert [stream.ended for stream in engine.streams] == [True, True]


def test_a_client_that_leaves_ends_all():
    engine = Engine(scripts=dict.fromkeys("abc", (threading.Event(),)))
    answered = read_all(call_of(engine, gone=lambda: len(engine.streams) == 2), requests(*"abc"))
    assert len(answered) == 2 and all(stream.ended and stream.closed.is_set() for stream in engine.streams)
    assert len(read_all(call_of(Engine(capacity=1), gone=lambda: True), requests("a", "b"))) == 1


def test_an_interruption_keeps_what_there_is_unless_prompts_are_left():
    cut = ("ha", RequestOutput(finish_reason=FinishReason.ABORT))
    engine = Engine(scripts={"a": cut}, capacity=4)
    assert texts(engine, "a", "b") == ["ha", "b"]
    with pytest.raises(GenerationFailed):
        texts(engine, "a", "b", "c", "d")


def test_all_are_started_or_none():
    engine = Engine(scripts=dict.fromkeys("abc", (threading.Event(),)), refusals=[None, None, FULL])
    with pytest.raises(Overloaded):
        start_all(call_of(engine), requests(*"abc"))
    assert len(engine.streams) == 2 and all(stream.closed.is_set() for stream in engine.streams)


def test_a_slow_answer_does_not_hold_up_another():
    never = threading.Event()
    engine = Engine(scripts={"a": (never,), "b": ("x", 0.01) * 20})
    running = list(enumerate(start_all(call_of(engine), requests("a", "b"))))
    said = []
    while len(running) == 2:
        said += news(running)
        running = still_running(running)
    assert {index for index, _ in said} == {1} and joined([output for _, output in said]).text == "x" * 20
    assert running[0][0] == 0


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

"""The engine's thread, scheduler and slots together, on a model whose answer betrays every mix-up of the cache."""

import logging
import threading
import time

import pytest
import torch

from server.core import FinishReason, GenerationRequest, Message, Overflow, SamplingParams
from server.engine.answer import LocalRequestStream
from server.engine.prompting import fit_prompt
from server.errors import BadRequest, ContextOverflow, Overloaded, ShuttingDown
from tests.engine.doubles import EOS, VOCAB, AsciiTokenizer, HashNetwork, PlainFamily, expected, make_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture
def engine_with():
    engines = []

    def make(*args, **kwargs):
        engines.append(make_engine(*args, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ids_request(ids, params=GREEDY, **fields):
    return GenerationRequest(prompt_ids=tuple(ids), params=params, **fields)


def collect(stream):
    """All ids, the text, and the last output."""
    outputs = list(stream)
    return [i for o in outputs for i in o.token_ids], "".join(o.text for o in outputs), outputs[-1]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.005)


def test_one_answer(engine_with):
    ids, text, last = collect(engine_with().submit(ids_request([5, 6, 7])))
    assert ids == expected([5, 6, 7], 12)
    assert text == "".join(map(chr, ids))
    assert last.finish_reason is FinishReason.LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (3, 12, 0)


def test_many_answers_at_once_are_each_right(engine_with):
    """More requests than slots, prompts longer than a chunk: nothing is mixed, whoever shares the batch."""
    engine = engine_with(slots=3, queue=30)
    prompts = [[1 + (i * j) % 30 for j in range(1, 3 + 3 * i)] for i in range(16)]
    streams = [engine.submit(ids_request(prompt)) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert collect(stream)[0] == expected(prompt, 12)


def test_running_streams_wait_for_one_chunk_at_most(engine_with):
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    engine = engine_with(network, prefill_chunk=8)
    short = engine.submit(ids_request([5, 3], SamplingParams(temperature=0, max_tokens=40)))
    wait_until(lambda: network.steps)
    long = engine.submit(ids_request(range(10, 74)))
    gate.set()
    assert collect(long)[0] == expected(range(10, 74), 12)
    assert collect(short)[0] == expected([5, 3], 40)
    mixed = [step for step in network.steps if max(step) > 2]
    assert [max(step) for step in mixed] == [8] * 8  # 64 prompt tokens in chunks of 8 ...
    assert all(1 in step for step in mixed)  # ... and the running answer got a token beside each


def test_several_prompts_share_one_chunk(engine_with):
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    engine = engine_with(network, prefill_chunk=8)
    streams = [engine.submit(ids_request([3]))]
    wait_until(lambda: network.steps)
    prompts = [range(10, 31), range(40, 63)]
    streams += [engine.submit(ids_request(prompt)) for prompt in prompts]
    gate.set()
    for prompt, stream in zip([[3], *prompts], streams, strict=True):
        assert collect(stream)[0] == expected(prompt, 12)
    assert max(sum(length for length in step if length > 1) for step in network.steps) == 8


def test_the_same_question_again_reads_its_last_token_only(engine_with):
    engine = engine_with()
    for cached in (0, 19):
        ids, _, last = collect(engine.submit(ids_request(range(10, 30))))
        assert (ids, last.usage.cached_tokens) == (expected(range(10, 30), 12), cached)


def test_follow_up_reads_only_what_is_new(engine_with):
    network = HashNetwork()
    engine = engine_with(network)
    first, _, _ = collect(engine.submit(ids_request(range(10, 60))))
    read = network.rows_read
    follow_up = [*range(10, 60), *first, 7, 8, 9]
    ids, _, last = collect(engine.submit(ids_request(follow_up)))
    assert ids == expected(follow_up, 12)
    # everything but the answer's last token (drawn, never read) was in the slot
    assert last.usage.cached_tokens == len(follow_up) - 4
    assert network.rows_read - read == 4 + 11


def test_alternating_conversations_keep_their_prefix(engine_with):
    """Three conversations that begin alike, two slots: a turn of one does not wipe out another."""
    engine = engine_with(slots=2, prefill_chunk=64)
    talks = [[9] * 4 + [20 + i] * 40 for i in range(2)]
    for turn in range(3):
        for talk in talks:
            ids, _, last = collect(engine.submit(ids_request(talk)))
            assert ids == expected(talk, 12)
            if turn:
                assert last.usage.cached_tokens >= len(talk) - 4
            talk += [*ids, 5, 6]


def test_shared_prefix_is_copied_from_a_running_slot(engine_with):
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    engine = engine_with(network, prefill_chunk=64)
    system = list(range(30, 60))
    slow = engine.submit(ids_request([*system, 3]))
    wait_until(lambda: network.steps)
    gate.set()
    wait_until(lambda: len(network.steps) > 1)
    ids, _, last = collect(engine.submit(ids_request([*system, 4, 5])))
    assert ids == expected([*system, 4, 5], 12)
    assert last.usage.cached_tokens == len(system)
    assert collect(slow)[0] == expected([*system, 3], 12)


def test_without_causal_prompt_nothing_is_reused_or_cut(engine_with, caplog):
    network = HashNetwork()
    engine = engine_with(network, causal_prompt=False, prefill_chunk=8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ids, _, last = collect(engine.submit(ids_request(range(10, 50))))
            assert ids == expected(range(10, 50), 12)
            assert last.usage.cached_tokens == 0
    assert caplog.text.count("40 prompt tokens are read in one step: this model reads every prompt whole") == 2
    assert [step for step in network.steps if step != [1]] == [[40], [40]]


def test_stop_token_is_not_part_of_the_answer(engine_with):
    logits = torch.zeros(VOCAB)
    logits[EOS] = 9.0
    ids, text, last = collect(engine_with(HashNetwork({4: logits})).submit(ids_request([5, 4])))
    assert (ids, text, last.finish_reason) == ([], "", FinishReason.STOP)


def test_max_length_counts_prompt_and_answer(engine_with):
    params = SamplingParams(temperature=0, max_length=20)
    ids, _, last = collect(engine_with().submit(ids_request([5] * 14, params)))
    assert (len(ids), last.finish_reason) == (6, FinishReason.LENGTH)


def test_stop_string_never_leaks_a_part(engine_with):
    answer = "".join(map(chr, expected([5, 6, 7], 40)))
    stop = answer[17:21]
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop, "never"))
    outputs = list(engine_with().submit(ids_request([5, 6, 7], params)))
    assert "".join(o.text for o in outputs) == answer[: answer.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_text_that_only_looks_like_a_stop_string_is_given_in_the_end(engine_with):
    answer = "".join(map(chr, expected([5, 6, 7], 12)))
    params = SamplingParams(temperature=0, max_tokens=12, stop=(answer[-2:] + "~never~",))
    assert collect(engine_with().submit(ids_request([5, 6, 7], params)))[1] == answer


def test_close_ends_with_abort_and_frees_the_slot(engine_with):
    network = HashNetwork()
    engine = engine_with(network, slots=1, queue=0, max_length=100_000)
    stream = engine.submit(ids_request([5, 6], SamplingParams(temperature=0)))
    first = stream.get(timeout=10)
    assert first.token_ids
    stream.close()
    rest = list(stream)
    assert rest[-1].finish_reason is FinishReason.ABORT
    assert sum(len(o.token_ids) for o in [first, *rest]) == rest[-1].usage.completion_tokens
    wait_until(lambda: not engine._live)
    steps = len(network.steps)
    time.sleep(0.05)
    assert len(network.steps) == steps
    assert collect(engine.submit(ids_request([7])))[0] == expected([7], 12)


def test_abort_by_client_and_by_id(engine_with):
    engine = engine_with(max_length=100_000)
    endless = SamplingParams(temperature=0)
    mine, other, third = (engine.submit(ids_request([i], endless, client=c)) for i, c in ((1, "a"), (2, "b"), (3, "b")))
    assert engine.abort(client="a") == 1
    assert list(mine)[-1].finish_reason is FinishReason.ABORT
    assert other.get(timeout=10).finish_reason is None
    assert engine.abort(request_id=other.request_id) == 1
    assert list(other)[-1].finish_reason is FinishReason.ABORT
    assert third.get(timeout=10).finish_reason is None
    assert engine.abort(client="nobody") == 0


def test_waiting_request_can_be_aborted(engine_with):
    engine = engine_with(slots=1, max_length=100_000)
    running = engine.submit(ids_request([1], SamplingParams(temperature=0)))
    waiting = engine.submit(ids_request([2]))
    waiting.close()
    assert [o.finish_reason for o in waiting] == [FinishReason.ABORT]
    running.close()


def test_full_queue_is_refused_before_anything_runs(engine_with):
    engine = engine_with(slots=1, queue=1, max_length=100_000)
    streams = [engine.submit(ids_request([i], SamplingParams(temperature=0))) for i in (1, 2)]
    with pytest.raises(Overloaded) as caught:
        engine.submit(ids_request([3]))
    assert caught.value.retry_after > 0
    for stream in streams:
        stream.close()
    assert collect(engine.submit(ids_request([3])))[0] == expected([3], 12)


def test_an_answer_that_has_ended_takes_no_room_while_its_last_step_still_runs(engine_with):
    gate = threading.Event()
    network = HashNetwork({9: gate})
    engine = engine_with(network, slots=1, queue=0)
    engine.submit(ids_request([9])).close()
    stream = engine.submit(ids_request([3]))
    gate.set()
    assert collect(stream)[0] == expected([3], 12)


@pytest.mark.parametrize("effect", [RuntimeError("boom"), torch.full((VOCAB,), float("nan")), MemoryError()])
def test_a_failure_ends_only_its_own_request(engine_with, effect):
    network = HashNetwork({3: effect})
    gate = network.script[4] = threading.Event()
    engine = engine_with(network, prefill_chunk=64)
    first = engine.submit(ids_request([9, 4]))
    wait_until(lambda: network.steps)
    bad, good = engine.submit(ids_request([8, 3])), engine.submit(ids_request([8, 5]))
    gate.set()
    last = collect(bad)[2]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error.zh and last.error.en and "boom" not in last.error.en
    assert collect(first)[0] == expected([9, 4], 12)
    assert collect(good)[0] == expected([8, 5], 12)
    assert collect(engine.submit(ids_request([8, 6])))[0] == expected([8, 6], 12)


def test_one_bad_row_of_logits_is_enough(engine_with):
    logits = torch.zeros(VOCAB)
    logits[77] = float("inf")
    last = collect(engine_with(HashNetwork({3: logits})).submit(ids_request([3])))[2]
    assert last.finish_reason is FinishReason.ERROR and "NaN" in last.error.en


def test_seed_decides_whatever_else_is_running(engine_with):
    class Flat(HashNetwork):
        def _logits(self, ids, segment, cache):
            return super()._logits(ids, segment, cache) / 5

    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, seed=11, max_tokens=30)
    engine = engine_with(Flat(), slots=4, queue=20)
    alone = collect(engine.submit(ids_request([5, 6], params)))[0]
    streams = [engine.submit(ids_request([5, 6], p)) for p in [SamplingParams(max_tokens=30), params] * 4]
    answers = [collect(stream)[0] for stream in streams]
    assert answers[1::2] == [alone] * 4
    assert len({tuple(a) for a in answers[0::2]}) > 1  # without a seed they differ


def test_answer_prefix_comes_first_and_at_once(engine_with):
    network = HashNetwork()
    gate = network.script[ord("x")] = threading.Event()
    stream = engine_with(network).submit(
        GenerationRequest(messages=(Message("user", "x"),), answer_prefix="Sure, ", params=GREEDY)
    )
    assert stream.get(timeout=10).text == "Sure, "
    gate.set()
    prompt = [ord(c) for c in "x\nSure, "]
    assert collect(stream)[1] == "".join(map(chr, expected(prompt, 12)))


def rounds(count, size=20):
    turns = [Message(role, c * size) for i in range(count) for role, c in (("user", chr(97 + i)), ("assistant", "-"))]
    return (*turns, Message("user", "now"))


def test_oldest_rounds_are_dropped_into_80_percent(engine_with):
    params = SamplingParams(temperature=0, max_length=150, max_tokens=1)
    request = GenerationRequest(
        messages=(Message("system", "S"), *rounds(6)), overflow=Overflow.DROP_OLDEST, params=params
    )
    usage = collect(engine_with().submit(request))[2].usage
    # "S", two rounds of 42 and "now" with their newlines are 90; a third round would make 132 > 120
    assert usage.prompt_tokens == 90


@pytest.mark.parametrize("max_length", range(20, 240, 7))
@pytest.mark.parametrize("size", [0, 3, 20])
def test_as_many_rounds_are_kept_as_fit(size, max_length):
    tokenizer, family, allowed = AsciiTokenizer(), PlainFamily(), int(max_length * 0.8)
    messages = rounds(9, size)
    request = GenerationRequest(messages=messages, overflow=Overflow.DROP_OLDEST)
    prompts = [family.build_prompt(tokenizer, messages[first:]) for first in range(0, len(messages), 2)]
    longest = next(ids for ids in prompts if len(ids) <= allowed)
    assert fit_prompt(family, tokenizer, request, max_length).ids == longest


def test_a_history_of_megabytes_is_not_encoded_whole():
    class Counting(AsciiTokenizer):
        encoded = 0

        def encode(self, text):
            self.encoded += len(text)
            return super().encode(text)

    tokenizer = Counting()
    request = GenerationRequest(messages=rounds(25, size=200_000), overflow=Overflow.DROP_OLDEST)
    assert fit_prompt(PlainFamily(), tokenizer, request, 100).ids == tokenizer.encode("now\n")
    assert tokenizer.encoded < 500_000


def test_a_query_that_alone_is_too_long_is_refused_with_both_numbers(engine_with):
    request = GenerationRequest(
        messages=(Message("user", "q" * 99),), overflow=Overflow.DROP_OLDEST, params=SamplingParams(max_length=100)
    )
    with pytest.raises(ContextOverflow) as caught:
        engine_with().submit(request)
    assert "100 tokens" in caught.value.en and "80" in caught.value.en and "raise max_length" in caught.value.en
    with pytest.raises(ContextOverflow, match="server's limit"):
        engine_with(max_length=100).submit(request)


def test_refuse_needs_room_for_one_token(engine_with):
    engine = engine_with(max_length=50)
    assert collect(engine.submit(ids_request([5] * 49)))[2].usage.completion_tokens == 1
    with pytest.raises(ContextOverflow):
        engine.submit(ids_request([5] * 50))


@pytest.mark.parametrize("bad", [GenerationRequest(), ids_request([VOCAB]), ids_request([-1])])
def test_a_request_without_a_usable_prompt_is_the_callers_error(engine_with, bad):
    with pytest.raises(BadRequest):
        engine_with().submit(bad)


def test_closing_the_engine_ends_streams_and_refuses_new_ones(engine_with):
    engine = engine_with(slots=1, max_length=100_000)
    running = engine.submit(ids_request([1], SamplingParams(temperature=0)))
    waiting = engine.submit(ids_request([2]))
    running.get(timeout=10)
    engine.close()
    for stream in (running, waiting):  # no interruption that somebody wished for: a client must not take it for an end
        last = list(stream)[-1]
        assert (last.finish_reason, last.error.code) == (FinishReason.ERROR, "shutting_down")
    with pytest.raises(ShuttingDown):
        engine.submit(ids_request([3]))


def test_the_prompt_is_told_however_late_its_reader_comes(engine_with, monkeypatch):
    class Late(LocalRequestStream):
        def __init__(self, sequence, *args):
            time.sleep(0.05)
            super().__init__(sequence, *args)

    monkeypatch.setattr("server.engine.local.LocalRequestStream", Late)
    stream = engine_with().submit(ids_request([65, 66]))
    assert (stream.prompt_ids, stream.prompt_text) == ((65, 66), "AB")
    assert collect(stream)[0] == expected([65, 66], 12)


def test_nothing_new_within_the_timeout(engine_with):
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    stream = engine_with(network).submit(ids_request([3]))
    assert stream.get(timeout=0.01) is None
    gate.set()
    assert collect(stream)[0] == expected([3], 12)
    assert stream.get(timeout=0.01) is None  # after the end there is nothing, and it does not wait

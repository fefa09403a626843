"""Which finished conversations stay in the cache: more than run at once, the latest, and each found whole again."""

import random
import threading

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import FinishReason, SamplingParams
from server.engine.kv_cache import KVCache
from server.engine.sequence import Sequence
from server.engine.slots import SlotTable, common_prefix
from server.errors import Overloaded
from server.models.base import KVShape, Segment
from tests.engine.answers import GREEDY, ask, ids_request, read
from tests.engine.doubles import HashNetwork, expected
from tests.engine.reference_engine import reference_engine
from tests.models.reference import OWN

ENDLESS = SamplingParams(temperature=0)


def talk(i, length=40):
    """Conversations that begin alike, as the template makes them."""
    return [9] * 4 + [20 + i] * length


def follow(engine, conversation):
    """Ask, check the answer, and let the conversation go on behind it; how many ids were cached."""
    (answer,) = ask(engine, ids_request(conversation))
    assert answer.ids == expected(conversation, len(answer.ids))
    conversation += [*answer.ids, 5, 6]
    return answer.last.usage.cached_tokens


def computed(conversation):
    """Ids of it that its last round left in the cache: all but the last one drawn, and the new question."""
    return len(conversation) - 3


@pytest.mark.parametrize(("slots", "kept"), [(1, 5), (2, 4), (5, 1), (6, 0)])
def test_alternating_conversations_find_their_history(hashing, slots, kept):
    engine = hashing(slots=slots, kept=kept)
    talks = [talk(i) for i in range(6)]
    for conversation in talks:
        assert follow(engine, conversation) <= 4
    for _ in range(3):
        for conversation in talks:
            assert follow(engine, conversation) == computed(conversation[:-26])


def test_without_kept_slots_they_do_not(hashing):
    engine = hashing(slots=2)
    talks = [talk(i) for i in range(6)]
    assert max(follow(engine, conversation) for _ in range(3) for conversation in talks) <= 4


def test_the_least_recent_one_goes_first(hashing):
    engine = hashing(slots=1, kept=2)
    first, second, third, fourth = (talk(i) for i in range(4))
    for conversation in (first, second, third, first, fourth):
        follow(engine, conversation)
    assert [follow(engine, conversation) > 4 for conversation in (fourth, first, third)] == [True] * 3
    assert follow(engine, second) == 4
    assert [follow(engine, conversation) > 4 for conversation in (first, fourth)] == [True, False]


def test_an_idle_conversation_is_no_safer_for_beginning_like_all_others(hashing):
    engine = hashing(slots=1, kept=2)
    idle = talk(0)
    follow(engine, idle)
    for i in range(1, 4):
        follow(engine, talk(i))
    assert follow(engine, idle) == 4


def test_a_branch_leaves_the_conversation_it_comes_from(hashing):
    """Though that is the least recent one: it has just been of use."""
    engine = hashing(slots=1, kept=2)
    long, other, third = talk(0, 60), talk(1), talk(2)
    for conversation in (long, other, third):
        follow(engine, conversation)
    assert follow(engine, [*long[:30], 7, 8]) == 30
    assert follow(engine, long) == computed(long[:-26])


def test_scoring_a_prompt_takes_the_least_recent_slot(hashing):
    engine = hashing(slots=1, kept=2)
    talks = [talk(i) for i in range(3)]
    for conversation in talks:
        follow(engine, conversation)
    (answer,) = ask(engine, ids_request(talks[2], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)))
    assert answer.last.usage.cached_tokens == 0
    assert [follow(engine, conversation) > 4 for conversation in (talks[1], talks[2], talks[0])] == [True, True, False]


def test_as_many_run_at_once_as_without_kept_slots(hashing):
    network = HashNetwork()
    gate = network.script[3] = threading.Event()
    engine = hashing(network, slots=2, kept=4, queue=3, speculate=0)
    assert (engine.slots, engine.capacity) == (2, 5)
    prompts = [[3, 40 + i] for i in range(5)]
    streams = [engine.submit(ids_request(prompt)) for prompt in prompts]
    with pytest.raises(Overloaded):
        engine.submit(ids_request([1]))
    gate.set()
    for prompt, stream in zip(prompts, streams, strict=True):
        assert read(stream).ids == expected(prompt, GREEDY.max_tokens)
    assert max(map(len, network.steps)) == 2


def test_a_running_conversation_is_copied_into_a_kept_slot(hashing):
    engine = hashing(slots=2, kept=1, max_length=100_000)
    system = talk(0)
    slow = engine.submit(ids_request(system, ENDLESS))
    slow.get(timeout=10)
    for i in range(3):
        assert follow(engine, [*system, 50 + i, 60 + i]) == len(system)
    slow.close()
    ids = read(slow).ids
    assert ids == expected(system, 1 + len(ids))[1:]


def test_a_prompt_read_in_both_directions_finds_nothing(hashing):
    engine = hashing(slots=1, kept=2, causal_prompt=False)
    for _ in range(3):
        assert follow(engine, talk(0)) == 0


@pytest.mark.parametrize("name", ["small-chatglm2", "small-chatglm2-ptuning", "tiny-chatglm3-32k"])
def test_any_order_of_rounds_gives_a_fresh_engines_answers(name):
    """Networks with real attention; what is in no slot's own part is NaN, so that reading it would show."""
    chance = random.Random(name)
    asked, kept = [], {"slots": 2, "kept": 3, "max_length": 160}
    with reference_engine(OWN / name, **kept) as (engine, reference):
        poison(engine, 0 if reference.prefix is None else reference.prefix[0].shape[1])
        vocab = min(60, reference.network.vocab_size)
        talks = [[5, 6, 7, *(chance.randrange(vocab) for _ in range(12))] for _ in range(5)]
        for _ in range(20):
            pair = chance.sample(talks, chance.choice((1, 2)))
            for conversation, answer in zip(pair, ask(engine, *map(ids_request, pair)), strict=True):
                asked.append((list(conversation), answer))
                conversation += [*answer.ids, chance.randrange(vocab)]
                if len(conversation) > 100:
                    del conversation[chance.randrange(3, 60) :]
    assert sum(answer.last.usage.cached_tokens > 15 for _, answer in asked) > len(asked) // 2
    for conversation, answer in asked:
        with reference_engine(OWN / name, slots=1, max_length=160, speculate=0) as (fresh, _):
            (alone,) = ask(fresh, ids_request(conversation))
        assert alone.last.finish_reason is FinishReason.LENGTH
        assert (answer.ids, alone.last.usage.cached_tokens) == (alone.ids, 0)


def poison(engine, prefix):
    for tensor in (engine._runner._cache.keys, engine._runner._cache.values):
        tensor[..., prefix:, :] = torch.nan


def test_a_slot_takes_no_memory_before_it_is_used():
    shape, before = KVShape(layers=4, groups=2, head_dim=64), psutil.Process().memory_info().rss
    cache = KVCache(shape, 64, 4096, torch.float32, "cpu")
    assert KVCache.bytes_needed(shape, 64, 4096, torch.float32) == 2**30
    for layer in range(shape.layers):
        cache.update(layer, Segment(7, 0, 4096), torch.ones(4096, 2, 64), torch.ones(4096, 2, 64))
    grown = psutil.Process().memory_info().rss - before
    assert 2**30 / 64 * 0.9 < grown < 2**30 / 64 + 50 * 2**20


class Rule:
    """The rule once more: what each free slot holds, from the least to the most recently used."""

    def __init__(self, slots):
        self.free = [[] for _ in range(slots)]

    def acquire(self, prompt, running):
        def match(held):
            return min(common_prefix(held, prompt), len(prompt) - 1)

        best = max([*reversed(self.free), *running], key=match)
        others, is_free = [held for held in self.free if held is not best], not any(held is best for held in running)
        continued = is_free and 2 * match(best) >= len(best)
        gone = best if continued or not others else others[0]
        self.free = [held for held in self.free if held is not gone]
        return match(best)


class Table:
    """A SlotTable whose sequences are computed by hand; the cache holds the ids themselves."""

    def __init__(self, slots, at_once):
        self.cache = KVCache(KVShape(1, 1, 1), slots, 64, torch.float32, "cpu")
        self.table = SlotTable(self.cache, at_once, reuse_prefix=True)
        self.running = []

    def held(self):
        return [list(sequence.token_ids[: sequence.num_computed]) for sequence in self.running]

    def begin(self, prompt):
        self.running.append(Sequence("r", prompt, SamplingParams(), frozenset(), 64))
        self.table.acquire(self.running[-1])
        return self.running[-1]

    def compute(self, sequence, count, token):
        """The next ``count`` ids; where none is left then, ``token`` is drawn."""
        ids = sequence.token_ids[sequence.num_computed :][:count]
        rows = torch.tensor(ids, dtype=torch.float32).view(-1, 1, 1)
        self.cache.update(0, Segment(sequence.slot, sequence.num_computed, len(ids)), rows, -rows)
        sequence.num_computed += len(ids)
        if not sequence.num_pending:
            sequence.append(token)

    def check(self, sequence):
        nothing = Segment(sequence.slot, sequence.num_computed, 0)
        keys, values = self.cache.update(0, nothing, torch.empty(0, 1, 1), torch.empty(0, 1, 1))
        assert keys.flatten().tolist() == sequence.token_ids[: sequence.num_computed] == (-values).flatten().tolist()

    def end(self, sequence):
        self.check(sequence)
        self.running.remove(sequence)
        self.table.release(sequence)
        return sequence.token_ids[: sequence.num_computed]


ids = st.lists(st.integers(0, 2), min_size=1, max_size=9)
asking = st.tuples(st.just("ask"), st.integers(0, 9), st.integers(0, 12), ids)
computing = st.tuples(st.just("compute"), st.integers(0, 3), st.integers(1, 9), st.integers(0, 2))
ending = st.tuples(st.just("end"), st.integers(0, 3))


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 3), st.integers(0, 4), st.lists(st.one_of(asking, computing, ending), max_size=60))
def test_any_order_of_events_follows_the_rule(at_once, kept, events):
    table, rule, known = Table(at_once + kept, at_once), Rule(at_once + kept), [[]]
    for what, i, *rest in events:
        sequence = table.running[i % len(table.running)] if table.running else None
        assert table.table.has_room() == (len(table.running) < at_once)
        if what == "ask" and table.table.has_room():
            keep, new = rest
            prompt = [*known[i % len(known)][:keep], *new]  # the next round of one of them, or a branch
            shared = rule.acquire(prompt, table.held())
            begun = table.begin(prompt)
            assert (begun.num_cached, begun.num_computed) == (shared, shared)
            table.check(begun)
        elif what == "compute" and sequence and sequence.num_computed < 50:
            table.compute(sequence, *rest)
        elif what == "end" and sequence:
            rule.free.append(table.end(sequence))
            known.append(rule.free[-1])
        assert sorted(slot.tokens for slot in table.table._slots if slot.sequence is None) == sorted(rule.free)

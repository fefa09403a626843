"""Sources that have files in different versions: the published one counts, else the best source's."""

import pytest

from tests.download.conftest import (
    FIRST,
    MODEL,
    REPOSITORY,
    SECOND,
    SHARDS,
    contents,
    fill,
    folder_of,
    get,
    publish,
)
from tests.download.test_transfer import DAMAGED, LATE, SIZE, failure, serve_once


@pytest.mark.parametrize("listed", [DAMAGED, DAMAGED + b"more"], ids=["as large", "larger"])
def test_the_published_hash_decides_who_is_asked(listed, servers, program):
    other, good = servers(2)
    publish(program, {SECOND: SHARDS[SECOND]})
    other.repositories = {REPOSITORY: {**MODEL, SECOND: listed}}
    assert contents(get(program, other.url, good.url)) == MODEL
    assert SECOND not in other.fetched()


def test_without_a_hash_a_source_that_broke_off_goes_on(servers, program):
    first, other = servers(2)
    first.unhashed = other.unhashed = True
    first.cut[SECOND] = LATE
    assert contents(get(program, first.url, other.url)) == MODEL
    assert first.ranges(SECOND)[-1] == f"bytes={LATE}-" and not other.fetched()


def test_a_published_file_that_nobody_has(servers, program):
    (hub,) = servers(1)
    publish(program, {SECOND: DAMAGED})
    assert f"No source has {SECOND} as it was published" in failure(program, hub.url)
    publish(program, {SECOND: SHARDS[SECOND][:-1]})
    assert f"No source has {SECOND} as it was published" in failure(program, hub.url)
    publish(program, {SECOND: DAMAGED}, sized=False)
    hub.unhashed = True
    assert "has a file with other contents" in failure(program, hub.url)


def test_the_published_hash_is_checked_where_the_listing_has_none(servers, program):
    bad, good = servers(2)
    publish(program, {SECOND: SHARDS[SECOND]}, sized=False)
    bad.unhashed, bad.wrong[SECOND] = True, DAMAGED
    assert contents(get(program, bad.url, good.url)) == MODEL


def test_the_published_size_is_compared_where_listings_have_no_hash(servers, program):
    other, good = servers(2)
    publish(program, {SECOND: SHARDS[SECOND]})
    other.unhashed = good.unhashed = True
    other.repositories = {REPOSITORY: {**MODEL, SECOND: DAMAGED + b"more"}}
    assert contents(get(program, other.url, good.url)) == MODEL
    assert SECOND not in other.fetched()


def test_without_a_hash_no_file_is_made_of_two(servers, program):
    fails, good = servers(2)
    for hub in (fails, good):
        hub.unhashed = True
    good.wrong[SECOND] = b"x" * SIZE  # another version, as large by chance
    fails.cut[SECOND] = LATE
    serve_once(fails)
    fill(folder_of(program), {f"{FIRST}.part": b"?" * 1000})  # nobody could tell whether it belongs here
    there = contents(get(program, fails.url, good.url))
    assert there[FIRST] == SHARDS[FIRST] and there[SECOND] == b"x" * SIZE

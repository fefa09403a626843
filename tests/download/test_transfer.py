"""Files from servers that stall, break off, lie and refuse: what arrives in the end is right, or is not there."""

import time
from email.utils import formatdate

import pytest

from server.errors import StartupError
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
)

SIZE = len(SHARDS[SECOND])
LATE = 2_200_000  # a byte of SECOND that comes after what the measuring takes
DAMAGED = SHARDS[SECOND][:1000] + b"\0" * 10 + SHARDS[SECOND][1010:]


def failure(program, *sources: str) -> str:
    with pytest.raises(StartupError) as caught:
        get(program, *sources)
    assert not (folder_of(program) / SECOND).exists()  # nothing bears a name that it does not deserve
    return caught.value.en


def test_a_stall_in_the_middle_of_a_file_goes_on_elsewhere_at_the_same_byte(servers, program, capsys):
    stalls, good = servers(2)
    stalls.stall[SECOND] = LATE
    assert contents(get(program, stalls.url, f"modelscope={good.url}")) == MODEL
    assert good.fetched() == [SECOND] and good.ranges(SECOND)[-1] == f"bytes={LATE}-"
    assert f"{stalls.url} stalled: going on at 2.2 MB from {good.url}" in capsys.readouterr().out


def test_a_trickle_is_a_stall_where_there_is_another_source(servers, program, capsys):
    trickles, good = servers(2)
    trickles.slow_after[SECOND] = LATE
    assert contents(get(program, trickles.url, good.url)) == MODEL
    assert good.fetched() == [SECOND] and LATE <= int(good.ranges(SECOND)[-1][6:-1]) < LATE + 100_000
    assert "stalled" in capsys.readouterr().out


def test_one_file_that_is_refused_comes_from_another_source(servers, program):
    for status in (403, 404, 503):
        refuses, good = servers(2)
        refuses.statuses[FIRST] = [status] * 9
        folder = get(program / str(status), refuses.url, good.url)
        assert contents(folder) == MODEL
        assert FIRST in good.fetched() and SECOND not in good.fetched(), status


def test_a_version_that_nobody_gives_makes_way_for_another(servers, program):
    refuses, good = servers(2)
    refuses.repositories = {REPOSITORY: {**MODEL, FIRST: SHARDS[SECOND][:1_000_000]}}
    refuses.statuses[FIRST] = [403] * 9
    assert contents(get(program, refuses.url, good.url)) == MODEL
    assert SECOND not in good.fetched()


def test_a_source_that_asks_for_a_pause_is_not_waited_for(servers, program):
    busy, good = servers(2)
    busy.statuses[FIRST], busy.retry_after = [429] * 9, "2"
    began = time.monotonic()
    assert contents(get(program, busy.url, good.url)) == MODEL
    assert time.monotonic() - began < 2 + 1 and FIRST in good.fetched()


def test_of_two_sources_that_ask_for_a_pause_the_shorter_one_is_taken(servers, program):
    busy, good = servers(2)
    busy.statuses[FIRST], busy.retry_after = [429] * 9, "2"
    good.statuses[FIRST] = [503]
    assert contents(get(program, busy.url, good.url)) == MODEL
    assert busy.fetched().count(FIRST) == 1


def test_a_source_that_failed_comes_behind_the_others(servers, program):
    fails, good = servers(2)
    fails.statuses[FIRST], fails.retry_after = [503] * 9, "0"
    assert contents(get(program, fails.url, good.url)) == MODEL
    assert fails.fetched().count(FIRST) == 1 and SECOND in fails.fetched()


@pytest.mark.parametrize("fault", ["cut", "reset", "stall"])
def test_the_only_source_is_asked_again(fault, servers, program):
    (hub,) = servers(1)
    getattr(hub, fault)[SECOND] = LATE
    if fault == "stall":  # every answer ends after so many bytes
        hub.stall[SECOND] = 1_500_000
    assert contents(get(program, hub.url)) == MODEL
    asked = hub.ranges(SECOND)
    assert asked[0] == "" and 2 <= len(asked) <= 3
    if fault == "cut":
        assert asked[1] == f"bytes={LATE}-"


def test_a_source_that_is_gone_in_the_middle(servers, program):
    """The sentence says who did what, and that nothing is lost; the next run goes on."""
    (hub,) = servers(1)
    hub.cut[SECOND] = LATE
    serve_once(hub)
    said = failure(program, hub.url)
    assert f"{SECOND} was not downloaded to its end. {hub.url}: is busy or broken (500)." in said
    assert "stays in" in said
    assert (folder_of(program) / f"{SECOND}.part").read_bytes() == SHARDS[SECOND][:LATE]
    hub.statuses.clear()
    hub.requests.clear()
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges() == [(SECOND, f"bytes={LATE}-")]


def serve_once(hub) -> None:
    """SECOND is given once, then answered with 500."""

    class Later(list):
        def __bool__(self):
            return hub.fetched().count(SECOND) > 1

    hub.statuses[SECOND] = Later([500] * 9)


# being told to wait


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed(as_date, servers, program):
    (hub,) = servers(1)
    hub.statuses[FIRST] = [429]
    hub.retry_after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    began = time.monotonic()
    assert contents(get(program, hub.url)) == MODEL
    assert time.monotonic() - began >= 0.9
    assert hub.ranges(FIRST) == ["", ""]


def test_a_pause_that_is_too_long_is_not_taken(servers, program):
    (hub,) = servers(1)
    hub.statuses[FIRST], hub.retry_after = [429], "3600"
    assert "is busy or broken (429)" in failure(program, hub.url)


@pytest.mark.parametrize(("site", "listing"), [("", f"/models/{REPOSITORY}"), ("modelscope=", "/repo/files")])
def test_a_listing_is_asked_for_again_too(site, listing, servers, program):
    (hub,) = servers(1)
    hub.statuses[listing] = [429, 503]
    assert contents(get(program, f"{site}{hub.url}")) == MODEL
    assert not hub.statuses[listing]


# lies


def test_another_size_than_listed(servers, program):
    (hub,) = servers(1)
    hub.announced[SECOND] = SIZE + 5
    assert f"has a file of another size ({SIZE + 5} instead of {SIZE} bytes)" in failure(program, hub.url)
    liar, good = servers(2)
    liar.announced[SECOND] = SIZE - 5
    assert contents(get(program, liar.url, good.url)) == MODEL
    assert SECOND in good.fetched() and FIRST not in good.fetched()


def test_a_listing_with_another_size_than_the_file(servers, program):
    liar, good = servers(2)
    liar.claimed[FIRST] = 5_000_000  # and the measuring asks for the middle of the largest one
    assert contents(get(program, liar.url, good.url)) == MODEL


def test_wrong_bytes_are_never_taken(servers, program, capsys):
    (hub,) = servers(1)
    hub.wrong[SECOND] = DAMAGED
    assert f"{hub.url}: has a file with other contents" in failure(program, hub.url)
    bad, good = servers(2)
    bad.wrong[SECOND] = DAMAGED
    assert contents(get(program, bad.url, good.url)) == MODEL
    assert good.ranges(SECOND)[-1] == ""  # from its beginning
    assert f"the checksum of {SECOND} is wrong" in capsys.readouterr().out


def test_wrong_bytes_in_a_piece_of_a_file(servers, program):
    """Who of the two it was is found out by asking each for the whole."""
    bad, good = servers(2)
    bad.wrong[SECOND], bad.stall[SECOND] = DAMAGED, LATE
    assert contents(get(program, bad.url, good.url)) == MODEL


def test_sources_that_take_turns_until_the_hash_is_wrong(servers, program):
    """Then each of them has to give the whole alone, so that it is known who gives wrong bytes."""

    class Always(dict):
        def pop(self, name):
            return self[name]

    bad, good = servers(2)
    bad.cut = good.cut = Always({SECOND: 1_100_000})
    bad.wrong[SECOND] = b"\0" * 10 + SHARDS[SECOND][10:]
    assert contents(get(program, bad.url, good.url)) == MODEL
    assert good.ranges(SECOND)[-4:] == ["", "bytes=1100000-", "bytes=2200000-", "bytes=3300000-"]


def test_what_an_earlier_run_left_may_be_wrong(servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {f"{SECOND}.part": DAMAGED[:500_000]})
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges(SECOND) == ["bytes=500000-", ""]


def test_a_part_that_is_too_long(servers, program, capsys):
    (hub,) = servers(1)
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND] + b"more"})
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges(SECOND) == [""]
    said = capsys.readouterr().out
    assert "5 files, 6.6 MB to go" in said and "checking" not in said and "checksum" not in said


def test_a_part_that_has_everything(servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND]})
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges(SECOND) == []


def test_a_server_that_ignores_ranges(servers, program):
    (hub,) = servers(1)
    hub.ignores_range = True
    hub.cut[SECOND] = LATE
    fill(folder_of(program), {f"{FIRST}.part": SHARDS[FIRST][:700_001]})
    assert contents(get(program, hub.url)) == MODEL


def test_redirects_are_followed_with_the_range(servers, program):
    hub, other = servers(2)
    hub.elsewhere = other.url
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:700_001]})
    assert contents(get(program, hub.url)) == MODEL
    assert other.ranges(SECOND) == ["bytes=700001-"]


def test_compressed_answers_are_refused(servers, program):
    (hub,) = servers(1)
    hub.compresses = True
    assert "does not give the file as it is (compressed)" in failure(program, hub.url)

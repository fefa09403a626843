"""Answers that no good server gives, and some that good ones do: redirects, pauses, pieces, pages, certificates."""

import gzip
import re
import shutil
import socket
import subprocess
import threading

import pytest

from server.errors import StartupError
from tests.download.conftest import (
    FIRST,
    MODEL,
    ON_MODELSCOPE,
    REPOSITORY,
    SECOND,
    SHARDS,
    contents,
    fill,
    folder_of,
    get,
    publish,
)
from tests.download.test_transfer import LATE, SIZE, failure
from tests.hub_server import Hub

# redirects


def test_a_relative_redirect(servers, program):
    (hub,) = servers(1)
    hub.locations[SECOND] = f"../../../../cdn/{REPOSITORY}/{SECOND}"
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:700_001]})
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges(SECOND) == ["bytes=700001-"] * 2


@pytest.mark.parametrize("where", [SECOND, "ftp://127.0.0.1/model", "http://a..b/model", "http://[/"])
def test_a_redirect_to_nowhere(where, servers, program):
    bad, good = servers(2)
    bad.locations[SECOND] = where
    assert contents(get(program, bad.url, good.url)) == MODEL
    assert SECOND in good.fetched()
    if where == SECOND:
        assert f"{bad.url}: redirects in circles" in failure(program / "again", bad.url)


def test_a_signed_address_that_expires_in_the_middle(servers, program):
    """The source is asked for another one, twice if it gives out the old one again, and nothing comes twice."""
    (hub,) = servers(1)
    hub.signed, hub.cut[SECOND] = True, LATE
    assert contents(get(program, hub.url)) == MODEL
    given = [asked for method, path, asked in hub.requests if path.endswith(f"/cdn/{REPOSITORY}/{SECOND}")]
    assert given[-1] == f"bytes={LATE}-" and {*given} <= {"", f"bytes={LATE}-"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    paths = str(folder / "certificate.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]], check=True,
        capture_output=True,
    )  # fmt: skip
    return paths


def test_no_redirect_out_of_https(certificate, servers, program, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    (plain,) = servers(1)
    with Hub({ON_MODELSCOPE: MODEL}, certificate) as hub:
        hub.locations[SECOND] = f"{plain.url}/cdn/{REPOSITORY}/{SECOND}"
        assert f"{hub.url}: redirects from https to plain http" in failure(program, f"modelscope={hub.url}")
        hub.locations.clear()
        assert contents(get(program, f"modelscope={hub.url}")) == MODEL


def test_certificates_that_nobody_vouches_for(certificate, program, monkeypatch):
    with Hub({ON_MODELSCOPE: MODEL, REPOSITORY: MODEL}, certificate) as hub:
        for source in (f"modelscope={hub.url}", hub.url):
            assert "its certificate is not trusted (check the system's clock" in failure(program, source)
    monkeypatch.setenv("SSL_CERT_FILE", str(program / "gone.pem"))
    assert "unset it, or correct its path" in failure(program, hub.url)


# pauses


@pytest.mark.parametrize(
    "pause",
    ["0", "soon", "²", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "Mon, 01 Jan 0001 00:00:00 -0000",
     "Sat, 21 Nov 99999999999999999999 10:00:00 GMT"],
)  # fmt: skip
def test_pauses_that_are_over_or_none(pause, servers, program):
    (hub,) = servers(1)
    hub.statuses[FIRST], hub.retry_after = [429], pause
    assert contents(get(program, hub.url)) == MODEL


@pytest.mark.parametrize("pause", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_pauses_for_ever(pause, servers, program):
    (hub,) = servers(1)
    hub.statuses[FIRST], hub.retry_after = [503], pause
    assert "is busy or broken (503)" in failure(program, hub.url)


# pieces


def test_answers_that_are_shorter_than_asked(servers, program):
    (hub,) = servers(1)
    hub.most = 1_100_000
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:100_000]})
    assert contents(get(program, hub.url)) == MODEL  # each of them is good enough to forgive that it was short
    assert hub.ranges(SECOND) == [f"bytes={begin}-" for begin in range(100_000, SIZE, 1_100_000)]


@pytest.mark.parametrize("total", [str(SIZE + 1), "9" * 5000, ""])
def test_a_total_that_is_wrong(total, servers, program):
    bad, good = servers(2)
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:100_000]})
    bad.content_range = f"bytes 100000-{SIZE - 1}/{total}"
    assert contents(get(program, bad.url, good.url)) == MODEL
    assert good.ranges(SECOND)[-1] == "bytes=100000-"


def test_the_end_of_a_file_that_is_shorter_than_its_part(servers, program):
    (hub,) = servers(1)
    hub.announced[SECOND] = 200_000  # so it answers 416
    fill(folder_of(program), {f"{SECOND}.part": SHARDS[SECOND][:300_000]})
    assert f"has a file of another size (200000 instead of {SIZE} bytes)" in failure(program, hub.url)
    hub.announced.clear()
    assert contents(get(program, hub.url)) == MODEL
    assert hub.ranges(SECOND)[-1] == "bytes=300000-"


def test_sources_that_give_everything_from_the_beginning_have_not_stalled(servers, program, capsys):
    """What comes before the byte that is wanted counts for the speed."""
    hubs = servers(2)
    for hub in hubs:
        hub.ignores_range, hub.rate = True, 2.4e6
    fill(folder_of(program), {**MODEL, f"{SECOND}.part": SHARDS[SECOND][:3_000_000]})
    (folder_of(program) / SECOND).unlink()
    assert contents(get(program, *(hub.url for hub in hubs))) == MODEL
    assert "stalled" not in capsys.readouterr().out
    assert sum(hub.fetched().count(SECOND) for hub in hubs) == 1


# pages and listings


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_a_page_in_place_of_a_file(name, chunked, servers, program):
    bad, good = servers(2)
    bad.pages[name], bad.chunked = b"<html>please log in</html>" * 40, chunked
    assert contents(get(program, bad.url, good.url)) == MODEL


def test_a_compressed_file_that_breaks_off(servers, program):
    bad, good = servers(2)
    bad.compresses, bad.wrong[SECOND] = True, gzip.compress(SHARDS[SECOND])[:-1000]
    assert contents(get(program, bad.url, good.url)) == MODEL


@pytest.mark.parametrize("site", ["", "modelscope="])
@pytest.mark.parametrize(
    "page",
    [b"<html>", b"5", b"[]", b'{"siblings": 5, "Data": 5}', b'{"siblings": [5], "Data": {"Files": [5]}}',
     b'{"Data": null, "siblings": [{}]}', b"[" * 200_000],
    ids=["page", "number", "list", "numbers", "entries", "null", "deep"],
)  # fmt: skip
def test_a_listing_that_makes_no_sense(page, site, servers, program):
    (hub,) = servers(1)
    hub.pages["listing"] = page
    assert f"{hub.url}: gives answers that make no sense" in failure(program, f"{site}{hub.url}")


def test_a_listing_without_sizes(servers, program):
    (hub,) = servers(1)
    hub.unsized = True
    assert f"The model on {hub.url} is not complete" in failure(program, hub.url)
    assert not folder_of(program).exists() or contents(folder_of(program)) == {}
    assert hub.fetched() == []


def test_a_listing_that_says_that_a_file_is_empty(servers, program):
    bad, good = servers(2)
    bad.claimed["config.json"] = 0
    assert "still lacks config.json" in failure(program, bad.url)
    assert not (folder_of(program) / "config.json").exists()
    assert contents(get(program, bad.url, good.url)) == MODEL


@pytest.mark.parametrize("site", ["", "modelscope="])
def test_a_listing_with_names_that_lead_elsewhere(site, servers, program):
    """A backslash and a colon say so on Windows alone."""
    (hub,) = servers(1)
    names = ["../evil.safetensors", "..\\evil.safetensors", "C:evil.safetensors", "pytorch_model\\..\\..\\evil.bin"]
    unkind = {**MODEL, **dict.fromkeys(names, b"evil" * 5000)}
    hub.repositories = {REPOSITORY: unkind, ON_MODELSCOPE: unkind}
    assert contents(get(program, f"{site}{hub.url}")) == MODEL
    assert not [path for path in program.rglob("*") if "evil" in path.name]


def test_every_name_on_modelscope(servers, program):
    """A name that ModelScope does not have does no harm, and says so."""
    lacks, good = servers(2)
    lacks.repositories, good.repositories = {}, {"zai-org/codegeex2-6b-int4": MODEL}
    folder = get(program, f"modelscope={lacks.url}", good.url, name="codegeex2-6b-int4")
    assert contents(folder) == MODEL
    assert [path for _, path, _ in lacks.requests] == ["/api/v1/models/ZhipuAI/CodeGeeX2-6B-int4/repo/files"]
    with pytest.raises(StartupError, match=r"has none of .*ZhipuAI/ChatGLM-6B-int8.*: try another --source"):
        get(program, f"modelscope={lacks.url}", name="chatglm-6b-int8")


# proxies


def test_a_proxy_that_hangs(servers, program, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.setenv("HTTPS_PROXY", address)
        said = failure(program, "modelscope=http://mirror.invalid", "modelscope=https://mirror.invalid")
    assert all(f"{scheme}://mirror.invalid: stalled" in said for scheme in ("http", "https"))
    assert ". Check network and proxy and try again" in said


def test_a_proxy_that_refuses(servers, program, monkeypatch):
    (hub,) = servers(1)  # knows no CONNECT: 501
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTPS_PROXY", hub.url)
    said = failure(program, "modelscope=https://mirror.invalid")
    assert "https://mirror.invalid: cannot be reached through the proxy. Check network and proxy" in said


# another program


def test_a_part_that_somebody_else_writes_too(servers, program):
    """Where locks do not work: what was received is right, what is on the disk is not."""
    (hub,) = servers(1)
    hub.stall[SECOND] = LATE
    publish(program, SHARDS)
    part = folder_of(program) / f"{SECOND}.part"

    def write():
        assert hub.stalled.wait(20)
        with part.open("ab") as file:
            file.write(b"more")
        hub.stall.clear()

    thread = threading.Thread(target=write)
    thread.start()
    said = failure(program, hub.url)
    thread.join()
    assert re.search(rf"Cannot write to .*{re.escape(SECOND)}\.part .*close programs that have it open", said)
    assert contents(get(program, hub.url)) == MODEL

"""Which sources are asked, and in which order."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from server.config import parse
from server.download import web
from server.download.folder import CHAT
from server.download.sources import HF_MIRROR, HUGGING_FACE, MODELSCOPE, SOURCES, Hub, ModelScope, choose_sources, title
from server.errors import StartupError
from server.option_types import SOURCE_NAMES
from tests.download.conftest import MODEL, NAME, NOWHERE, ON_MODELSCOPE, REPOSITORY, SECOND, contents, folder_of, get


def test_the_fastest_source_gives_everything(servers, program, capsys):
    slow, fast = servers(2)[::-1]
    slow.rate = 2e6
    folder = get(program, slow.url, f"modelscope={fast.url}")
    assert contents(folder) == MODEL
    assert sorted(fast.fetched()) == sorted(MODEL) and slow.fetched() == []
    asked = {path for _, path, _ in fast.requests}
    assert f"/api/v1/models/{ON_MODELSCOPE}/repo/files" in asked  # in ModelScope's language, not the Hub's
    said = capsys.readouterr().out
    assert f"Downloading {ON_MODELSCOPE} from {fast.url} (" in said
    assert said.index(fast.url) < said.index(slow.url) and "MB/s), " in said


def test_the_speed_is_measured_by_a_piece_from_the_middle(servers, program):
    first, second = servers(2)
    get(program, first.url, second.url)
    probes = [asked for name, asked in second.ranges()]
    size = max(map(len, MODEL.values()))
    begin = size // 2 - 2**20
    assert probes == [f"bytes={begin}-{begin + 2 * 2**20 - 1}"]


def test_a_source_alone_is_not_measured(servers, program):
    (hub,) = servers(1)
    get(program, hub.url)
    assert not any("-" in asked for _, _, asked in hub.requests)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda hub: hub.statuses.update({f"/{NAME}": [403] * 9}), "refuses (403)"),
        (lambda hub: hub.statuses.update({".bin": [403] * 9}), "refuses (403)"),
        (lambda hub: hub.statuses.update({f"/{NAME}": [503] * 9}), "is busy or broken (503)"),
        (lambda hub: hub.statuses.update({f"/{NAME}": [200] * 9}), "gives answers that make no sense"),
        (lambda hub: hub.repositories.clear(), "does not have the model"),
    ],
)
def test_what_a_source_that_fails_says_and_the_other_one_is_used(fault, said, servers, program, capsys):
    bad, good = servers(2)
    fault(bad)
    assert contents(get(program, bad.url, good.url)) == MODEL
    assert f"{bad.url}: {said}" in capsys.readouterr().out


def test_a_source_that_never_answers_does_not_keep_anybody(servers, program, capsys):
    (hub,) = servers(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert contents(get(program, f"modelscope={url}", hub.url)) == MODEL
        assert time.monotonic() - began < 5
    assert url in capsys.readouterr().out


def test_a_source_that_is_too_slow_to_be_waited_for_still_helps(servers, program, monkeypatch, capsys):
    stalls, slow = servers(2)
    slow.rate = 1.5e6
    monkeypatch.setattr(web, "PATIENCE", web.PATIENCE._replace(grace=0.3, probe=5))
    stalls.stall[SECOND] = 2_200_000
    assert contents(get(program, stalls.url, slow.url)) == MODEL
    said = capsys.readouterr().out
    assert f"MB/s), {slow.url} to" in said and f"going on at 2.2 MB from {slow.url}" in said


@pytest.fixture
def dripping() -> Iterator[str]:
    """Address of a site whose answers never end, and never pause long enough to be given up."""
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    self.wfile.write(b" ")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        stop.set()
        server.shutdown()
        thread.join()


def test_an_answer_that_never_ends(dripping, servers, program, capsys, monkeypatch):
    (hub,) = servers(1)
    monkeypatch.setattr(web, "PATIENCE", web.PATIENCE._replace(grace=0.5))
    began = time.monotonic()
    assert contents(get(program, f"modelscope={dripping}", hub.url)) == MODEL
    assert time.monotonic() - began < 6
    assert f"{dripping}: no answer" in capsys.readouterr().out
    monkeypatch.setattr(web, "PATIENCE", web.PATIENCE._replace(longest=0.3))
    with pytest.raises(StartupError, match=r"Could not download .*: no answer"):
        get(program / "again", f"modelscope={dripping}")


def test_a_source_that_ignores_ranges_comes_last(servers, program):
    first, second = servers(2)
    first.ignores_range = True
    get(program, first.url, second.url)
    assert first.fetched() == [] and sorted(second.fetched()) == sorted(MODEL)


def test_when_nobody_has_it_everybody_is_named(servers, program):
    refuses, lacks = servers(2)
    refuses.statuses[f"/{NAME}"] = [403] * 9
    lacks.repositories = {}
    with pytest.raises(StartupError) as caught:
        get(program, refuses.url, f"modelscope={lacks.url}", NOWHERE)
    for part in (f"{refuses.url}: refuses (403)", f"{lacks.url}: does not have the model", f"{NOWHERE}: no connection",
                 "HF_TOKEN", str(folder_of(program))):  # fmt: skip
        assert part in caught.value.en, caught.value.en
    assert f"{refuses.url} 不让下载（403）" in caught.value.zh and "没有这个模型" in caught.value.zh


def test_what_is_asked_where_nothing_is_said():
    bases = [(type(source), source.base) for source in choose_sources(None, None)]
    assert bases == [(ModelScope, MODELSCOPE), (Hub, HF_MIRROR), (Hub, HUGGING_FACE)]
    assert tuple(SOURCES) == SOURCE_NAMES
    names = CHAT.repositories[NAME]
    assert [source.names(names) for source in choose_sources(None, None)] == [
        ("ZhipuAI/chatglm2-6b",), *[("THUDM/chatglm2-6b", "zai-org/chatglm2-6b")] * 2
    ]
    assert CHAT.repositories["chatglm-6b-int4"].modelscope == ("ZhipuAI/ChatGLM-6B-Int4",)


@pytest.mark.parametrize(
    ("argv", "env", "chosen"),
    [
        ([], {}, [MODELSCOPE, HF_MIRROR, HUGGING_FACE]),
        ([], {"HF_ENDPOINT": "https://my.mirror/"}, ["https://my.mirror"]),
        (["--source", "auto"], {}, [MODELSCOPE, HF_MIRROR, HUGGING_FACE]),
        (["--endpoint", "auto"], {"HF_ENDPOINT": "https://my.mirror"}, [MODELSCOPE, HF_MIRROR, HUGGING_FACE]),
        (["--source", "huggingface, modelscope"], {}, [HUGGING_FACE, MODELSCOPE]),
        (["--source", "modelscope"], {"HF_ENDPOINT": "https://my.mirror"}, [MODELSCOPE]),
        ([], {"CHATGLM_SOURCE": "modelscope=http://10.0.0.2:80/,https://a.b/c"}, ["http://10.0.0.2:80", "https://a.b/c"]),
    ],
)
def test_what_the_user_may_say(argv, env, chosen, tmp_path):
    config = parse(argv, env=env, root=tmp_path)
    assert [source.base for source in choose_sources(config.source, config.endpoint)] == chosen


@pytest.mark.parametrize("value", ["", "baidu", "modelscope=", "modelscope=x", "huggingface=http://a", "ftp://a", ","])
def test_a_source_that_is_none(value, tmp_path):
    with pytest.raises(StartupError, match="allowed: auto, or some of modelscope"):
        parse(["--source", value], env={}, root=tmp_path)


def test_a_password_is_not_shown():
    assert title(Hub("https://me:secret@my.mirror:81/hf")) == "https://my.mirror:81/hf"


def test_the_token_goes_to_whom_the_user_named_alone(servers, program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    named, elsewhere = servers(2)
    named.elsewhere = elsewhere.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    assert contents(get(program, named.url)) == MODEL
    assert all(headers.get("authorization") == "Bearer hf_secret" for headers in lowered(named))
    assert lowered(elsewhere) and not any("authorization" in headers for headers in lowered(elsewhere))


def test_a_token_that_cannot_be_sent(servers, program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_令牌")
    (hub,) = servers(1)
    with pytest.raises(StartupError, match=r"the token has characters .* Set the environment variable HF_TOKEN to a"):
        get(program, hub.url)


def test_a_mirror_that_nobody_named_gets_no_token(servers, program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (mirror,) = servers(1)
    monkeypatch.setitem(SOURCES, "hf-mirror", Hub(mirror.url, SOURCES["hf-mirror"].trusted))
    get(program, "hf-mirror")
    assert len(mirror.requests) > len(MODEL)
    assert not any("authorization" in headers for headers in lowered(mirror))
    assert REPOSITORY in mirror.requests[0][1]


def lowered(hub) -> list[dict[str, str]]:
    return [{key.lower(): value for key, value in headers.items()} for headers in hub.headers]

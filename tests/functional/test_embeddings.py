"""Embeddings from the real program: downloaded on first use, refused in a sentence, and never in chat's way."""

import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from server.assembly import build_embedder
from server.config import Config
from server.errors import Unavailable
from tests.conftest import ROOT
from tests.functional.program import Program, parse_events
from tests.functional.test_serve import ENDLESS
from tests.hub_server import Hub
from tests.sentence_models import make_bert, pickle_weights, plain_vectors, real_model

NAME = "text2vec-large-chinese"
REPOSITORY = f"GanymedeNil/{NAME}"
TEXTS = ["你好", "hello world", "", "一丁丂" * 100]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def root(tmp_path):
    """A copy of the program, so that nothing is downloaded into this one."""
    shutil.copytree(ROOT / "server", tmp_path / "server", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "THUDM" / "demo", tmp_path / "THUDM" / "demo")
    return tmp_path


def start(root, endpoint, *options) -> Program:
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return Program(*options, root=root, env=env)


def ask(program, path, language="en", **fields):
    """(status, parsed body)"""
    connection = program.connect()
    connection.request("POST", path, json.dumps(fields), {"Accept-Language": language})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def embed(program, texts):
    """Vectors by GLM-API's route."""
    status, answer = ask(program, "/embedding", prompt=texts)
    assert status == 200, answer
    return torch.tensor(answer["data"])


def assert_same(found, folder, texts):
    torch.testing.assert_close(found, plain_vectors(folder, texts)[0], rtol=0, atol=1e-5)


def test_first_use_downloads_once_and_takes_up_what_broke_off(root, tmp_path_factory):
    source = pickle_weights(make_bert(tmp_path_factory.mktemp("hub")))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with Hub({REPOSITORY: files}) as hub, start(root, hub.url) as program:
        hub.statuses["pytorch_model.bin"] = [404] * 9
        status, answer = ask(program, "/embedding", prompt=TEXTS)
        assert status == 503 and "tries again" in answer["message"]
        assert program.ask("你好")
        hub.statuses.clear()
        hub.requests.clear()
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda _: embed(program, TEXTS), range(3)):
                assert_same(found, source, TEXTS)
        assert hub.fetched() == ["pytorch_model.bin"]
        asked = len(hub.requests)
        status, answer = ask(program, "/v1/embeddings", input=TEXTS, model="any")
        assert (status, answer["model"]) == (200, NAME)
        assert_same(torch.tensor([item["embedding"] for item in answer["data"]]), source, TEXTS)
        assert answer["usage"]["prompt_tokens"] == plain_vectors(source, TEXTS)[1]
        assert len(hub.requests) == asked
        said = program.text.partition("Ctrl+C stops it\n")[2]
    logged = r"\d\d:\d\d:\d\d (the sentence model |req-|POST /embedding .* 503 ).*"
    ours = re.compile(rf"{logged}|Downloading {REPOSITORY} .*|\(\d/\d\) .*")
    assert [line for line in said.splitlines() if not ours.fullmatch(line)] == []


def test_without_model_and_network_a_sentence_says_where_to_put_it(root):
    folder = root / "THUDM" / NAME
    with start(root, NOWHERE) as program:
        asked = {"/embedding": {"prompt": ["你好"]}, "/v1/embeddings": {"input": "你好", "model": "any"}}
        for path, fields in asked.items():
            for language, words in (("en", "yourself"), ("zh", "自己放进")):
                status, answer = ask(program, path, language, **fields)
                message = answer.get("message") or answer["error"]["message"]
                assert status == 503
                for part in (words, str(folder), "--embedding-model", NOWHERE):
                    assert part in message
        assert "Traceback" not in program.text
        assert program.ask("你好")
        make_bert(folder)
        assert_same(embed(program, TEXTS), folder, TEXTS)


def test_stopping_does_not_wait_for_a_download(root, tmp_path_factory):
    source = make_bert(tmp_path_factory.mktemp("hub"))
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with Hub({REPOSITORY: files}) as hub, start(root, hub.url) as program:
        hub.stall["model.safetensors"] = 1000
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, program, "/embedding", prompt=TEXTS)
            assert hub.stalled.wait(30)
            assert program.ask("你好")
            assert program.stop(seconds=30) == 0
            status, answer = waiting.result(30)
        assert status == 503 and "shutting down" in answer["message"]
        assert "Traceback" not in program.text


@pytest.mark.skipif(os.name == "nt", reason="makes a sparse file")
def test_a_model_larger_than_the_memory_is_not_loaded(tmp_path):
    folder = make_bert(tmp_path / "huge")
    os.truncate(folder / "model.safetensors", 2**42)
    embedder = build_embedder(Config(embedding_model=str(folder)), threads=1)
    with pytest.raises(Unavailable, match="takes 4096"):
        embedder.embed(TEXTS)
    embedder.close()


def test_an_unknown_name_is_found_before_anything_is_loaded():
    program = Program("--embedding-model", "text2vec-large", wait=False)
    assert program.stop(how=0, seconds=60) == 2
    assert f"Did you mean {NAME}?" in program.text and len(program.text.splitlines()) == 1


def test_chat_goes_on_while_a_long_list_is_embedded():
    """Order of events alone: of an endless stream many come between the list's beginning and its end."""
    texts, ended = ["word " * 300] * 24, threading.Event()
    with Program("--embedding-model", str(real_model())) as program:
        assert embed(program, ["load it"]).shape == (1, 384)
        response = program.post("/generate", {"query": "你好", "stream": True, **ENDLESS, "max_length": 2048})
        events = parse_events(response)
        next(events)
        with ThreadPoolExecutor(1) as pool:
            listed = pool.submit(embed, program, texts)
            listed.add_done_callback(lambda _: ended.set())
            between = 0
            for _ in events:
                between += not ended.is_set()
                if ended.is_set():
                    break
            assert len(listed.result()) == len(texts)
        response.close()
    assert between > 3

"""benchmarks.peers: what it measures is what was asked for, and the resting side rests.

Where LLAMA_CPP names a folder of ``python -m benchmarks.peers --prepare``, with llama.cpp itself too.
"""

import http.client
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.figures import Figure, Measurement, Watch, digits, peak_bytes, spread
from benchmarks.llama_cpp import model_file, prepare
from benchmarks.peer_engines import TEXT_ONLY, OurEngine, random_ids
from benchmarks.peer_servers import LlamaServer, OurServer
from benchmarks.peers import parse, run
from server.errors import ModelError, StartupError
from server.models.chatglm2.tokenizer import ChatGLM2Tokenizer
from tests.conftest import ROOT

DEMO = ROOT / "THUDM" / "demo"
LLAMA = os.environ.get("LLAMA_CPP", "")
OPTIONS = ["--device", "cpu", "--threads", "1", "--slots", "4", "--max-length", "400"]
needs_llama = pytest.mark.skipif(not LLAMA, reason="LLAMA_CPP names no folder with llama.cpp's tools")


@pytest.fixture(scope="module")
def engine():
    engine = OurEngine(["--model", str(DEMO), *OPTIONS, "-q", "4"])
    yield engine
    engine.close()


def test_the_engine_answers_in_full_and_rests_between(engine):
    # the demo would end this by itself after a few tokens
    stamps = engine._answer(random_ids("a", 20), 60)
    assert len(stamps) == 60 and stamps == sorted(stamps) and stamps[0] > 0
    process = psutil.Process(engine.pid)
    time.sleep(0.3)  # OpenMP's threads spin a moment longer
    before = sum(process.cpu_times()[:2])
    time.sleep(1)
    assert sum(process.cpu_times()[:2]) - before <= 0.03


def test_speeds_are_tokens_by_time(engine, monkeypatch):
    asked, stamps = [], [2.0, 2.5, 3.0]
    monkeypatch.setattr(engine, "_answer", lambda ids, n: asked.append((len(ids), n)) or stamps[:n])
    assert engine.decode(100, 2, "seed") == 2.0
    assert engine.read_prompt(300, "seed") == 150.0
    assert engine.decode(0, 1, "seed") == 2.0
    assert asked == [(100, 3), (300, 1), (1, 2)]


def test_a_tokens_cost_is_that_of_the_quantized_weights(engine):
    config = json.loads((DEMO / "config.json").read_text())
    hidden, ffn, layers, vocab = (config[k] for k in ("hidden_size", "ffn_hidden_size", "num_layers",
                                                      "padded_vocab_size"))  # fmt: skip
    qkv = hidden + 2 * config["multi_query_group_num"] * config["kv_channels"]
    macs = layers * hidden * (qkv + hidden + 3 * ffn) + hidden * vocab
    assert engine.cost.macs == macs
    assert 4.125 * macs / 8 <= engine.cost.bytes < 5 * macs / 8  # codes and scales, norms and biases, no embedding


def test_a_model_that_cannot_be_loaded_is_said_in_words(tmp_path):
    with pytest.raises(StartupError) as raised:
        OurEngine(["--model", str(tmp_path), *OPTIONS])
    assert str(tmp_path) in raised.value.en and str(tmp_path) in raised.value.zh


def test_every_answer_token_is_text_that_is_sent_at_once():
    tokenizer = ChatGLM2Tokenizer.load(DEMO / "tokenizer.model", (), shows_special=False)
    assert all(tokenizer.token_bytes(token_id).decode() for token_id in TEXT_ONLY)


def test_clients_of_our_server_get_all_tokens():
    server = OurServer(DEMO, OPTIONS)
    try:
        assert set(ids(server, random_ids("a", 20), server.body)) <= set(TEXT_ONLY)
        answer = server.ask(random_ids("long answer", 20), 300)
        assert answer.first - answer.begin < (answer.end - answer.begin) / 2
        speed, first = server.together(4, 20, 30, "seed")
        assert 0 < first < 4 * 30 / speed
        before, after, ratio = server.follow_up(300, 20, "seed")
        assert ratio == after / before
        assert server.peak() > 50e6
        with pytest.raises(StartupError, match="400"):
            server.ask(random_ids("long", 500), 1)
    finally:
        server.close()
    assert server.peak() == 0


def ids(server, prompt, body):
    """The greedy answer's first 12 tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", server.path, json.dumps({**body(prompt, 12), "stream": False}),
                       {"Content-Type": "application/json"})  # fmt: skip
    answer = json.loads(connection.getresponse().read())
    return answer["tokens"] if "tokens" in answer else answer["choices"][0]["token_ids"]


class Clock:
    """A side that takes no time: it notes who was asked for what."""

    pid = None

    def __init__(self, name, log):
        self.name, self.log = name, log


def test_sides_take_turns_with_the_same_seed():
    log, disturbance = [], []
    sides = [Clock("ours", log), Clock("peer", log)]
    measurement = Measurement(["a", "b"], sides, lambda side, seed: log.append((side.name, seed)) or (len(log), 7))
    for index in range(2):
        measurement.run(index, disturbance)
    assert log == [("ours", "a 0"), ("peer", "a 0"), ("peer", "a 1"), ("ours", "a 1")]
    assert [(f.title, f.ours, f.peer) for f in measurement.figures] == [("a", [1, 4], [2, 3]), ("b", [7, 7], [7, 7])]
    assert len(disturbance) == 4


def test_cells():
    row = Figure("t", [10.0, 12.0, 11.0], [4.0, 4.4, 4.1]).row()
    assert row == "| t | 11.0 (10.0-12.0) | 4.10 (4.00-4.40) | 2.68 (2.50-2.73) |"
    assert Figure("t", [0.01234]).row() == "| t | 0.0123 |  |  |"
    assert (digits(1234.5), digits(0), digits(99.96), spread([5])) == ("1234", "0", "100.0", "5.00")


def test_what_others_compute_is_noticed():
    with psutil.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        whole, rest = Watch(None), Watch(busy.pid)
        begin, before = time.perf_counter(), sum(busy.cpu_times()[:2])
        time.sleep(1)
        others, without_it = whole.others(), rest.others()
        share = (sum(busy.cpu_times()[:2]) - before) / (time.perf_counter() - begin) / psutil.cpu_count()
        busy.kill()
    assert share > 0 and 0 <= without_it < others <= 1.1
    assert others - without_it == pytest.approx(share, abs=0.05)


def test_peak_memory_is_the_kernels_own():
    assert psutil.Process().memory_info().rss <= peak_bytes(os.getpid()) < psutil.virtual_memory().total


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(StartupError, match=r"--prepare"):
        model_file(tmp_path, 4)
    with pytest.raises(StartupError, match=r"config\.json"):
        run(parse(["--llama", str(tmp_path), "--model", str(tmp_path)]))
    with pytest.raises(SystemExit):
        parse(["--bits", "4"])


@needs_llama
def test_llama_cpp_continues_our_gguf_as_we_do(tmp_path):
    from benchmarks.gguf_file import write_gguf

    link(tmp_path)
    write_gguf(DEMO, tmp_path / "Q8_0.gguf", next(tmp_path.glob("src/*/vendor/llama.cpp/gguf-py")))  # in 16 bits
    server, ours = LlamaServer(tmp_path, 8, 1, 1, 400), OurServer(DEMO, OPTIONS)

    def unbiased(prompt, count):
        return {**ours.body(prompt, count), "logit_bias": {2: -100}}  # as llama.cpp's ignore_eos

    try:
        for seed in "abc":
            prompt = random_ids(seed, 40)
            assert ids(server, prompt, server.body) == ids(ours, prompt, unbiased)
    finally:
        server.close()
        ours.close()


@needs_llama
def test_a_whole_run(tmp_path, capsys):
    link(tmp_path)
    prepare(tmp_path, DEMO)
    assert not list(tmp_path.glob("*.part"))
    run(parse(["--llama", str(tmp_path), "--model", str(DEMO), "--repeat", "1", "--new-tokens", "8", "--context", "64",
               "--prompt", "64", "--clients", "2", "--history", "100"]))  # fmt: skip
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    numbers = {title.strip(): [cell.strip() for cell in cells] for title, *cells in rows}
    assert all(float(cell) > 0 for cell in numbers["decoding 8 tokens at context 64, tokens/s"])
    assert all(float(cell) > 0 for cell in numbers["2 clients, tokens/s together"])
    assert float(numbers["llama.cpp Q4_0"][0]) < 0.002  # GB per token
    assert len(numbers["a conversation's first round of 100 tokens, seconds to the first token"]) == 3
    assert [len(cells) for title, cells in numbers.items() if title.startswith("resident")] == [3]


def link(folder):
    for name in ("build", "src"):
        (folder / name).symlink_to(Path(LLAMA).resolve() / name)


@needs_llama
def test_other_generations_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    from benchmarks.gguf_file import write_gguf

    link(tmp_path)
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    save_file({"transformer.layers.0.mlp.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"transformer\.layers\.0\.mlp\.weight"):
        write_gguf(tmp_path, tmp_path / "x.gguf", next(tmp_path.glob("src/*/vendor/llama.cpp/gguf-py")))

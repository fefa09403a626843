"""``python -m server download`` as its users meet it: a process, what it prints, its exit code, and Ctrl+C."""

import os
import subprocess
import sys

import pytest

from server.config import ROOT
from tests.download.conftest import (
    FIRST,
    MODEL,
    NAME,
    NOWHERE,
    REPOSITORY,
    SECOND,
    SHARDS,
    contents,
    fill,
    folder_of,
    get,
    publish,
)

INT4 = {"config.json": b'{"quantization_bit": 4}', "tokenizer.model": MODEL["tokenizer.model"],
        "pytorch_model.bin": SHARDS[FIRST][:1_000_000]}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
from server import __main__
from server.download import command, manifest
root = Path(sys.argv[1])
manifest.MANIFEST = root / "manifest.json"
really = command.download
command.download = lambda config: really(config, root)
sys.exit(__main__._run(["download", *sys.argv[2:]]))
"""


def start(root, *argv, **keywords) -> subprocess.Popen:
    env = {**os.environ, "PYTHONUTF8": "1"}
    language = () if "--language" in argv else ("--language", "en")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    command = [sys.executable, "-c", SCRIPT, str(root), *language, *argv]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)


def run(root, *argv) -> tuple[int, str, str]:
    process = start(root, *argv)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def test_a_model_is_downloaded_and_then_there_is_nothing_to_do(servers, program):
    hubs = servers(2)
    sources = f"modelscope={hubs[0].url},{hubs[1].url}"
    code, out, err = run(program, NAME, "--source", sources)
    assert code == 0, err
    assert out.endswith(f"The model is complete: {folder_of(program)}. To start it: --model {NAME}.\n")
    assert contents(folder_of(program)) == MODEL
    assert run(program, NAME, "--source", NOWHERE)[0] == 0


@pytest.mark.parametrize("argv", [(NAME,), ("--model", NAME), ("--verify", NAME), (NAME, "--source", "huggingface")])
def test_the_model_may_stand_anywhere(argv, program):
    publish(program, {name: content for name, content in MODEL.items() if not name.endswith(".json")})
    fill(folder_of(program), MODEL)
    assert run(program, *argv)[0] == 0


def test_wrong_use(program):
    code, _, err = run(program, NAME, "another")
    assert (code, err) == (2, "Unknown option another on the command line. --help lists them all.\n")
    code, out, _ = run(program, "--help")
    assert code == 0 and "--verify" in out and "--source" in out and "--port" not in out and "--threads" not in out
    code, _, err = run(program, "no-such-model")
    assert code == 2 and "There is no model no-such-model" in err


def test_failures_are_one_sentence_in_both_languages(program):
    code, _, err = run(program, NAME, "--source", NOWHERE)
    assert code == 2 and err.count("\n") == 1 and err.startswith("Could not download chatglm2-6b. ")
    code, _, err = run(program, NAME, "--source", NOWHERE, "--language", "zh")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"chatglm2-6b 下载不了。{NOWHERE} 连不上或连接断了。请")


@pytest.mark.skipif(os.name == "nt", reason="Windows says it differently")
def test_a_reader_that_leaves_is_no_disk_that_fails(servers, program):
    (hub,) = servers(1)
    reader, writer = os.pipe()
    os.close(reader)
    process = start(program, NAME, "--source", hub.url, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")


# --verify


def test_verify_says_what_is_wrong_and_download_mends_just_that(servers, program):
    (hub,) = servers(1)
    publish(program, {**SHARDS, "tokenizer.model": MODEL["tokenizer.model"]})
    fill(folder_of(program), {**MODEL, SECOND: SHARDS[SECOND][:-1] + b"?"})
    (folder_of(program) / "tokenizer.model").unlink()
    code, out, _ = run(program, NAME, "--verify", "--source", NOWHERE)
    assert code == 1
    for line in (f"  {FIRST}  ok", f"  {SECOND}  broken", "  tokenizer.model  missing", "  config.json  ok"):
        assert line in out.splitlines()
    assert f"has 2 files that are missing or broken: download {NAME} fetches just those." in out
    assert run(program, NAME, "--source", hub.url)[0] == 0
    assert sorted(hub.fetched()) == [SECOND, "tokenizer.model"]
    code, out, _ = run(program, NAME, "--verify", "--source", NOWHERE, "--language", "zh")
    assert code == 0 and f"  {SECOND}  完好" in out and out.endswith(f"{folder_of(program)} 完好。\n")


def test_verify_hashes_what_looks_untouched_and_download_believes_it(servers, program):
    (hub,) = servers(1)
    get(program, hub.url)
    path = folder_of(program) / FIRST
    status = path.stat()
    path.write_bytes(b"?" + SHARDS[FIRST][1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a disk that forgets bits changes no time
    assert run(program, NAME, "--source", NOWHERE)[0] == 0
    assert run(program, NAME, "--verify", "--source", NOWHERE)[0] == 1
    assert run(program, NAME, "--source", hub.url)[0] == 0
    assert contents(folder_of(program)) == MODEL


def test_verify_asks_a_source_where_nothing_is_known(servers, program):
    (hub,) = servers(1)
    fill(folder_of(program), {**MODEL, SECOND: SHARDS[SECOND][:-1] + b"?"})
    code, out, _ = run(program, NAME, "--verify", "--source", hub.url)
    assert code == 1 and f"  {SECOND}  broken" in out and not hub.fetched()
    code, out, _ = run(program, NAME, "--verify", "--source", NOWHERE)
    assert code == 0 and f"  {SECOND}  no checksum to compare with" in out and "some files have no checksum" in out


def test_verify_of_what_is_not_there(program):
    code, out, _ = run(program, NAME, "--verify")
    assert (code, out) == (1, f"There is no {folder_of(program)} yet: download {NAME} fetches it.\n")
    code, _, err = run(program, str(folder_of(program) / "own"), "--verify")
    assert code == 2 and err.startswith("There is no model ")


# which model


def test_without_a_name_small_machines_are_given_the_int4_edition(servers, program):
    (hub,) = servers(1)
    hub.repositories["zai-org/chatglm2-6b-int4"] = INT4
    code, out, _ = run(program, "--profile", "small", "--device", "cpu", "--source", hub.url)
    assert code == 0 and "the official int4 edition chatglm2-6b-int4 (1.1 MB) is downloaded" in out
    assert contents(program / "THUDM" / "chatglm2-6b-int4") == INT4 and not folder_of(program).exists()
    code, out, _ = run(program, NAME, "-q", "4", "--device", "cpu", "--source", hub.url)  # named: only told of it
    assert code == 0 and "--model chatglm2-6b-int4" in out and contents(folder_of(program)) == MODEL


def test_a_model_that_is_named_may_be_for_another_machine(servers, program):
    (hub,) = servers(1)
    code, _, err = run(program, NAME, "-q", "16", "--device", "cuda:7", "--source", hub.url)
    assert code == 0, err
    code, _, err = run(program, "-q", "16", "--device", "cuda:7", "--source", NOWHERE, "--model", "auto")
    assert code in (0, 2) and "Could not download" not in err


def test_any_model_of_the_hub(servers, program):
    (hub,) = servers(1)
    hub.repositories = {"someone/my-chatglm2": MODEL}
    code, out, err = run(program, "someone/my-chatglm2", "--source", hub.url)
    folder = program / "THUDM" / "someone--my-chatglm2"
    assert code == 0, err
    assert contents(folder) == MODEL and f"--model {folder.name}." in out
    assert get(program, NOWHERE, name="someone/my-chatglm2") == folder  # how --model finds it afterwards
    code, _, err = run(program, "someone/else", "--source", hub.url)
    assert code == 2 and f"{hub.url} has none of someone/else" in err
    assert not (program / "THUDM" / "someone--else").exists()


def test_a_stranger_on_modelscope_is_not_taken_for_the_owner(servers, program, monkeypatch):
    (hub,) = servers(1)
    hub.repositories = {"someone/model": MODEL}
    monkeypatch.setattr("server.download.sources.SOURCES", {})
    with pytest.raises(Exception, match="Could not download"):
        from server.download import ensure_model

        ensure_model("someone/model", root=program, thorough=True)
    assert contents(get(program, f"modelscope={hub.url}", name="someone/model", thorough=True)) == MODEL


def test_a_model_of_another_kind_is_refused_before_the_download(servers, program):
    (hub,) = servers(1)
    hub.repositories = {"someone/llama": {"config.json": b"{}", "model.safetensors": b"s" * 5000}}
    code, _, err = run(program, "someone/llama", "--source", hub.url)
    assert code == 2 and "still lacks tokenizer.model or ice_text.model" in err and not hub.fetched()


def test_a_folder_elsewhere_is_completed(servers, program):
    (hub,) = servers(1)
    folder = fill(program / "我的 模型" / NAME, {FIRST: SHARDS[FIRST]})
    code, out, err = run(program, str(folder), "--source", hub.url)
    assert code == 0 and contents(folder) == MODEL and FIRST not in hub.fetched(), err
    assert f"--model {folder}." in out
    own = fill(program / "mine", {FIRST: SHARDS[FIRST]})
    code, _, err = run(program, str(own), "--source", hub.url)
    assert code == 2 and f"The model folder {own} lacks" in err


def test_the_sentence_model(servers, program):
    (hub,) = servers(1)
    model = {"config.json": b"{}", "vocab.txt": b"a\n" * 1000, "pytorch_model.bin": b"w" * 5000}
    hub.repositories = {"GanymedeNil/text2vec-large-chinese": model}
    code, out, _ = run(program, "text2vec-large-chinese", "--source", hub.url)
    assert code == 0 and "--embedding-model text2vec-large-chinese." in out
    assert contents(program / "THUDM" / "text2vec-large-chinese") == model


def test_a_source_that_never_had_the_model_is_not_asked(program):
    source = f"modelscope={NOWHERE}"
    code, _, err = run(program, "text2vec-large-chinese", "--source", source, "--language", "zh")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"{NOWHERE} 上没有 GanymedeNil/text2vec-large-chinese：请换一个 --source，")
    fill(program / "THUDM" / "text2vec-large-chinese", {"config.json": b"{}", "vocab.txt": b"a\n" * 1000,
                                                       "pytorch_model.bin": b"w" * 5000})  # fmt: skip
    code, out, _ = run(program, "text2vec-large-chinese", "--source", source, "--verify")
    assert code == 0 and "pytorch_model.bin  no checksum to compare with" in out


# proxies


def test_a_socks_proxy_is_explained(servers, program, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY")
    code, _, err = run(program, NAME, "--source", "modelscope")
    assert code == 2 and "The proxy in the environment" in err and "socksio" in err


def test_a_proxy_is_used(servers, program, monkeypatch):
    """It is asked for the address as a whole, so a server that knows whole addresses does for one."""
    (hub,) = servers(1)
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.delenv("NO_PROXY")
    code, _, err = run(program, NAME, "--source", "http://mirror.invalid")
    assert code == 0 and contents(folder_of(program)) == MODEL, err
    assert REPOSITORY in hub.requests[0][1]

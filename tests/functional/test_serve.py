"""The real program with the demo model: what a user sees, from the first line to Ctrl+C."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from server.running import find_server
from tests.conftest import ROOT
from tests.functional.program import Program, first_event, parse_events


@pytest.fixture(scope="module")
def program():
    with Program("--slots", "3", "--queue", "3", "--max-length", "1024") as running:
        yield running


# a penalty far below 1 makes the model repeat itself for ever: the end token was never said before
ENDLESS = {"repetition_penalty": 0.05, "temperature": 0, "max_length": 1024}


def run(*options, **kwargs):
    """A start that is expected to fail: (exit code, what it printed)."""
    program = Program(*options, wait=False, **kwargs)
    return program.stop(how=0, seconds=60), program.text


def test_it_answers_and_says_that_it_is_a_demo(program):
    answer = program.ask("你好")
    assert "演示" in answer and "\ufffd" not in answer


def test_start_prints_what_was_chosen_and_a_command_that_works(program):
    model = r"model: .*demo \(ChatGLM2\)\n(?!note)"
    chosen = (model, "profile: cpu .*float32", "at once: 3, .* 1024 tokens", "kept besides: 16;")
    for wanted in (*chosen, "ready: http.* browser", "Ctrl"):
        assert re.search(wanted, program.text), wanted
    command = program.wait_for(r"curl -N .*")[0]
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=True)
    lines = [line for line in done.stdout.decode().splitlines() if line]
    assert len(lines) > 1
    assert json.loads(lines[-1].removeprefix("data: "))["response"] == program.ask("你好")


def test_events_grow_to_the_plain_answer(program):
    texts = [event["response"] for event in program.events("int4是什么意思？")]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(texts) > 2 and texts[-1] == program.ask("int4是什么意思？")


def test_old_stream_carries_the_history(program):
    history = [["你好", "你好！"]]
    *_, last = program.events("谢谢", path="/stream", history=history)
    assert last == [last[0], [*history, ["谢谢", last[0]]]]


def test_answer_prefix_is_followed(program):
    answer = program.ask("怎么下载真正的模型？", answer_prefix="当然，")
    assert answer.startswith("当然，") and len(answer) > 10


def test_answers_at_once_are_those_given_alone(program):
    """Nothing mixed: more questions than slots at the same time, greedy and seeded."""
    questions = ["你好", "你是谁？", "什么是int4？", "Who are you?", "What is int8?", "谢谢"]
    for fields in ({}, {"temperature": 1.0, "seed": 5}):
        alone = {q: program.ask(q, **fields) for q in questions}
        with ThreadPoolExecutor(len(questions)) as pool:
            together = dict(zip(questions, pool.map(partial(program.ask, **fields), questions), strict=True))
        assert together == alone


def test_interrupt_keeps_what_there_is_even_under_full_load(program):
    """Every slot and every place in the queue is taken; /interrupt still gets through, and one more is told 503."""
    streams = [program.post("/generate", {"query": "你好", "stream": True, **ENDLESS}) for _ in range(6)]
    for response in streams:
        first_event(response)
    ended = program.text.count("tokens/s, abort")
    refused = program.post("/generate", {"query": "你好"})
    assert refused.status == 503 and int(refused.headers["Retry-After"]) > 0
    assert json.loads(refused.read())["success"] is False
    assert json.loads(program.post("/interrupt", b"").read()) == {"message": "OK", "success": True}
    for response in streams:
        assert "message" not in list(parse_events(response))[-1]
    assert program.ask("你好")
    assert program.text.count("tokens/s, abort") == ended + 6


def test_a_client_that_leaves_frees_its_place(program):
    ended = program.text.count("tokens/s, abort")
    for left in range(1, 4):
        response = program.post("/generate", {"query": "你好", "stream": True, **ENDLESS})
        first_event(response)
        response.close()
        program.wait_for(rf"(?s)(tokens/s, abort.*){{{ended + left}}}", seconds=3)
    assert program.ask("你好")


def test_a_query_that_is_too_long_is_told_both_numbers(program):
    response = program.post("/generate", {"query": "很长" * 2000, "max_length": 100})
    sentence = json.loads(response.read())["message"]
    assert response.status == 400 and re.search(r"\d{3,} tokens.* 80 ", sentence)


def test_oldest_rounds_are_dropped_and_the_answer_comes(program):
    history = [["问题" * 30, "回答" * 30]] * 40
    assert program.ask("你好", history=history, max_length=300)


def test_tokenize_counts_as_the_model_does(program):
    answer = json.loads(program.post("/tokenize", {"text": "你好 world", "return_tokens": True}).read())
    assert len(answer["tokens"]) == answer["len"] > 0
    assert "".join(answer["tokens"]).replace("▁", " ").strip() == "你好 world"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_running_streams_cleanly_within_five_seconds(how):
    with Program() as program:
        response = program.post("/generate", {"query": "你好", "stream": True, **ENDLESS, "max_length": 2048})
        events = parse_events(response)
        next(events)
        begin = time.perf_counter()
        program.process.send_signal(how)
        assert list(events)[-1]["response"] is not None  # the chunked body ends as it should, or this raises
        assert program.stop(how=0) == 0
        assert time.perf_counter() - begin < 5
        assert "Traceback" not in program.text


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = run("--port", str(port))
    assert code == 2 and f"port {port}" in text and "--port" in text and len(text.strip().splitlines()) == 1


def test_unwritable_chat_log(tmp_path):
    code, text = run("--chat-log", str(tmp_path / "missing" / "chat.log"))
    assert code == 2 and "chat.log" in text and len(text.strip().splitlines()) == 1


def test_missing_model_folder(tmp_path):
    code, text = run(model=str(tmp_path / "nothing"))
    assert code == 2 and "nothing" in text and len(text.strip().splitlines()) == 1


def test_damaged_model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, text = run(model=str(tmp_path))
    assert code == 2 and "Traceback" not in text and len(text.strip().splitlines()) == 1


def test_unknown_option():
    code, text = run("--prot", "80")
    assert code == 2 and "--port" in text and "Traceback" not in text


def test_failures_are_said_in_chinese_to_a_chinese_user():
    code, text = run("--quantize", "5", env={"CHATGLM_LANG": "zh"})
    assert code == 2 and "允许" in text


def test_chat_log_keeps_questions_and_answers(tmp_path):
    path = tmp_path / "聊天.log"
    with Program("--chat-log", str(path)) as program:
        assert str(path) in program.text
        answer = program.ask("你好")
        response = program.post("/generate", {"query": "讲个故事", "stream": True, **ENDLESS})
        events = parse_events(response)
        while not next(events)["response"]:
            pass
        response.close()
        program.wait_for("tokens/s, abort")
    whole, left = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert (whole["query"], whole["answer"], whole["finish_reason"]) == ("你好", answer, "stop")
    assert (left["query"], left["finish_reason"]) == ("讲个故事", "abort")
    assert left["prompt_tokens"] > 0 and left["completion_tokens"] > 0 and left["answer"]


def test_serving_needs_no_transformers():
    code = (
        "import sys; import server.serve, server.models.loader, server.api.app, server.api.wsgi;"
        "print(*sorted({'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.skipif(os.name == "nt", reason="a script stands for the browser")
def test_second_start_shows_the_page_of_the_first(tmp_path):
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/opened\n')
    browser.chmod(0o755)
    with Program() as first:
        options = ["--model", "demo", "--no-chat-log", "--port", str(first.port)]
        env = {**os.environ, "BROWSER": str(browser), "CHATGLM_LANG": "en"}
        command = [sys.executable, "-m", "server", *options]
        second = subprocess.run([*command, "--browser"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        said = f"runs already, opening its page: http://127.0.0.1:{first.port}"
        assert second.returncode == 0 and said in second.stdout
        assert (tmp_path / "opened").read_text() == f"http://127.0.0.1:{first.port}\n"
        assert find_server("0.0.0.0", first.port) == f"http://127.0.0.1:{first.port}"
        third = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert third.returncode == 2 and "may be running" in third.stderr


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\nServer: other\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b""])
def test_port_of_another_program_is_not_taken_for_ours(answer):
    with socket.create_server(("127.0.0.1", 0)) as other:
        def serve_once():
            connection, _ = other.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        thread = threading.Thread(target=serve_once, daemon=True)
        thread.start()
        assert find_server("127.0.0.1", other.getsockname()[1]) is None
        thread.join(5)

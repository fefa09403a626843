"""my-chatglm2's dialect, byte by byte."""

import json

import pytest

from server.api import chatlog
from server.api.chatlog import open_chat_log
from server.core import Message, Overflow
from server.errors import Overloaded, StartupError
from tests.dialects import recorded
from tests.dialects.recorded import FAILURE, REFUSALS, client_of, engine_for
from tests.fake_engine import FakeEngine


def post(engine, path="/generate", **fields):
    return client_of(engine).post(path, json=fields)


@pytest.mark.parametrize("path", recorded.requests("my_chatglm2"), ids=lambda path: path.stem)
def test_bytes(path, unpaced):
    assert recorded.send(client_of(engine_for(path.stem)), path) == recorded.expected(path)


def test_request_to_the_engine():
    engine = FakeEngine(max_length=1000)
    post(engine, query="q", answer_prefix="P", max_length="4096", history=[["a", "b", "c", "d"]], top_p="0.5")
    (request,) = engine.requests
    assert [(m.role, m.content) for m in request.messages] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "q"),
    ]
    assert (request.answer_prefix, request.overflow, request.client) == ("P", Overflow.DROP_OLDEST, "127.0.0.1")
    assert (request.params.max_length, request.params.top_p, request.params.temperature) == (1000, 0.5, 1.0)
    assert (request.params.top_k, request.params.max_tokens, request.params.seed) == (50, None, None)


@pytest.mark.parametrize("name", ["generate_gbk_body", "generate_bom_body", "generate_gbk_query"])
def test_encodings_of_windows_clients(name):
    engine = FakeEngine()
    recorded.send(client_of(engine), recorded.DATA / "my_chatglm2" / f"{name}.request")
    assert engine.requests[0].messages == (Message("user", "你是谁？"),)


def test_null_means_default_and_unknown_fields_are_ignored():
    engine = FakeEngine()
    response = post(engine, query=None, history=None, temperature=None, stream=None, top_k=None, num_beams=[{}])
    assert response.status_code == 200
    assert engine.requests[0].messages == (Message("user", ""),)
    assert engine.requests[0].params.temperature == 1.0


def test_extensions_reach_the_engine():
    engine = FakeEngine()
    post(engine, query="q", top_k=0, repetition_penalty="1.1", seed=5, max_tokens=3, temperature=0, top_p=0)
    params = engine.requests[0].params
    assert (params.top_k, params.repetition_penalty, params.seed, params.max_tokens) == (0, 1.1, 5, 3)
    assert (params.temperature, params.top_p) == (0, 0)


def test_both_streams_and_plain_answers_carry_the_request_id():
    for fields in ({"query": "q"}, {"query": "q", "stream": True}):
        assert post(FakeEngine("a"), **fields).headers["X-Request-Id"] == "request-1"
    assert post(FakeEngine("a"), "/stream", query="q").headers["X-Request-Id"] == "request-1"


def test_interrupt_means_the_callers_own_answers_unless_an_id_is_named():
    engine = FakeEngine()
    client = client_of(engine)
    for send in ({}, {"json": {}}, {"json": {"id": None}}, {"json": {"id": "x"}}, {"data": b"  "}):
        assert client.post("/interrupt", **send).json == {"message": "OK", "success": True}
    mine = {"request_id": None, "client": "127.0.0.1"}
    assert engine.aborts == [mine, mine, mine, {"request_id": "x", "client": None}, mine]


def test_what_the_server_cannot_do_now_is_in_its_log(caplog):
    engine = FakeEngine()
    post(engine, query=7)
    assert caplog.text == ""
    engine.refuse = Overloaded("服务器已满。", "The server is full.")
    post(engine, query="q")
    assert "POST /generate from 127.0.0.1: 503 The server is full." in caplog.text


def test_retry_after():
    engine = FakeEngine()
    engine.refuse = REFUSALS["overloaded"]
    assert post(engine, query="q").headers["Retry-After"] == "7"


def test_chat_log(tmp_path):
    path = tmp_path / "聊天.log"
    chat_log = open_chat_log(path)
    client = client_of(FakeEngine("你", "好"), chat_log=chat_log)
    client.post("/generate", json={"query": "问\n题"})
    client.post("/generate", json={"query": "b", "stream": True}, buffered=True).close()
    client.post("/stream", json={"query": "c", "answer_prefix": "P"}, buffered=True).close()
    chat_log.close()
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(line["query"], line["answer"]) for line in lines] == [("问\n题", "你好"), ("b", "你好"), ("c", "P你好")]
    assert list(lines[0]) == [
        *("time", "client", "id", "query", "answer", "finish_reason", "prompt_tokens", "completion_tokens")
    ]
    assert [lines[0][key] for key in list(lines[0])[1:3]] == ["127.0.0.1", "request-1"]
    assert [lines[0][key] for key in list(lines[0])[5:]] == ["stop", 7, 2]
    assert "问" in path.read_text("utf-8")


def test_chat_log_of_failed_answers(tmp_path):
    chat_log = open_chat_log(tmp_path / "chat.log")
    client = client_of(FakeEngine("半", FAILURE), chat_log=chat_log)
    client.post("/generate", json={"query": "a"})
    client.post("/generate", json={"query": "a", "stream": True}, buffered=True).close()
    chat_log.close()
    lines = [json.loads(line) for line in (tmp_path / "chat.log").read_text("utf-8").splitlines()]
    assert [(line["answer"], line["finish_reason"]) for line in lines] == [("半", "error")] * 2


def test_a_full_chat_log_is_renamed_or_else_goes_on(tmp_path, monkeypatch, caplog, capfd):
    def refuse(*names):
        raise PermissionError(32, "another program has it open")

    path = tmp_path / "chat.log"
    monkeypatch.setattr(chatlog, "MAX_BYTES", 300)
    chat_log = open_chat_log(path)
    client = client_of(FakeEngine("a"), chat_log=chat_log)

    def ask(query):
        client.post("/generate", json={"query": query})
        return [file.name for file in sorted(tmp_path.iterdir())]

    assert [ask("one"), ask("two")] == [["chat.log"], ["chat.log", "chat.log.1"]]
    with monkeypatch.context() as windows:
        windows.setattr("os.rename", refuse)
        assert [ask("three"), ask("four")] == [["chat.log", "chat.log.1"]] * 2
    assert path.read_text("utf-8").count("\n") == 3
    assert ask("five") == ["chat.log", "chat.log.1", "chat.log.2"]
    assert "one" in (tmp_path / "chat.log.2").read_text("utf-8") and "five" in path.read_text("utf-8")
    chat_log.close()
    assert caplog.text == capfd.readouterr().err == ""


def test_a_chat_log_that_can_no_longer_be_written_is_one_line(tmp_path, caplog, capfd):
    path = tmp_path / "logs" / "chat.log"
    path.parent.mkdir()
    chat_log = open_chat_log(path)
    path.unlink()
    path.parent.rmdir()
    assert client_of(FakeEngine("a"), chat_log=chat_log).post("/generate", json={"query": "q"}).text == "a"
    assert caplog.text.count("\n") == 1 and "cannot be written" in caplog.text and capfd.readouterr().err == ""


def test_chat_log_that_cannot_be_written(tmp_path):
    with pytest.raises(StartupError) as caught:
        open_chat_log(tmp_path / "missing" / "chat.log")
    assert "missing" in caught.value.zh and "missing" in caught.value.en


def test_a_stream_that_raises_ends_like_a_failed_generation(unpaced, caplog):
    engine = FakeEngine("半")
    stream_get = engine.submit

    def submit(request):
        stream = stream_get(request)
        get = stream.get

        def broken_get(timeout=None):
            output = get(timeout)
            if output and output.finish_reason:
                raise OSError("secret")
            return output

        stream.get = broken_get
        return stream

    engine.submit = submit
    body = post(engine, query="q", stream=True).data.decode()
    assert body.endswith('"message": "读取回答时出错，详见服务器日志。", "success": false}\n\n')
    assert "secret" not in body
    assert post(engine, query="q").status_code == 500
    assert "secret" in caplog.text

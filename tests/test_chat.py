"""The terminal chat without its terminal: commands, history, pipes, and everything a server may do to it."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from unittest.mock import ANY

import pytest

from server.chat import remote
from server.chat.conversation import Conversation
from server.chat.loop import Chat, command_of
from server.chat.remote import RemoteServer
from server.config import parse
from server.core import FinishReason, Message, Overflow, RequestOutput, SamplingParams
from server.errors import ContextOverflow, GenerationFailed, ServerError, StartupError
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.functional import live

PARAMS = SamplingParams(temperature=0.3, top_p=0.6)


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        ("clear", ("clear", "")),
        (" stop\n", ("stop", "")),
        ("exit", ("stop", "")),
        ("/quit", ("stop", "")),
        ("/help ", ("help", "")),
        ("/prefix", ("prefix", "")),
        ("/prefix Sure, ", ("prefix", "Sure, ")),
        ("/prefix 当然，\n", ("prefix", "当然，")),
        ("/prefixes", ("/prefixes", "")),
        ("/hlep", ("/hlep", "")),
        (" /hlep", ("", "")),
        ("stop it", ("", "")),
        ("/generate 怎么用？", ("", "")),
        ("/etc/passwd", ("", "")),
        ("", ("", "")),
    ],
)
def test_commands(typed, command):
    assert command_of(typed) == command


def test_options():
    chosen = parse(["chat", "--prefix", "", "--temperature", "0", "--top-p", "1", "--url", "http://a"], env={})
    assert (chosen.prefix, chosen.temperature, chosen.top_p, chosen.url) == ("", 0.0, 1.0, "http://a")
    for typed in ("host:5178", "http://host:5178/", "http://host:5178/v1", "host:5178/v1/"):
        assert parse(["chat", "--url", typed], env={}).url == "http://host:5178"
    assert parse(["chat"], env={}).log_level == "warning"
    assert parse(["chat"], env={"CHATGLM_LOG_LEVEL": "debug"}).log_level == "debug"
    for wrong in (["--temperature", "2.1"], ["--temperature", "nan"], ["--top-p", "-1"], ["--url", "ftp://host"]):
        with pytest.raises(StartupError, match=wrong[0]):
            parse(["chat", *wrong], env={})


class Typist:
    """A Screen on which the given lines are typed; ``seen`` is all that it was told, ``drafts`` what it was offered."""

    def __init__(self, *lines: str, interrupt_at: str = "never"):
        self.lines = list(lines)
        self.seen: list[str] = []
        self.drafts: list[str] = []
        self._interrupt_at = interrupt_at

    def read(self, draft):
        self.drafts.append(draft)
        return self.lines.pop(0) if self.lines else None

    @contextlib.contextmanager
    def answering(self):
        yield lambda: self._interrupt_at in self.seen

    def show(self, text):
        self.seen.append(text)

    notice = fail = show

    def clear(self):
        self.seen.append("cleared")


def run(engine, typist, language="en"):
    Chat(Conversation(engine.submit, PARAMS), typist, language).run()
    return typist


def said(engine):
    return [[message.content for message in request.messages] for request in engine.requests]


def test_rounds_are_remembered_until_clear():
    engine = FakeEngine("a", "b")
    typist = run(engine, Typist("one", "", "  ", "two\n", "clear", "three", "stop", "never asked"))
    assert said(engine) == [["one"], ["one", "ab", "two"], ["three"]]
    assert typist.seen == ["a", "b", "a", "b", "cleared", "a", "b"]
    request = engine.requests[1]
    assert request.messages[1] == Message("assistant", "ab")
    assert (request.overflow, request.params, request.answer_prefix) == (Overflow.DROP_OLDEST, PARAMS, "")


def test_an_interrupted_answer_is_remembered_as_far_as_it_came():
    engine = FakeEngine("so far", threading.Event(), "never")
    typist = run(engine, Typist("one", "two", interrupt_at="so far"), "zh")
    assert engine.streams[0].closed.is_set() and said(engine)[1] == ["one", "so far", "two"]
    assert "停止" in typist.seen[1] and typist.drafts[:2] == ["", ""]


def test_an_answer_that_is_cut_off_says_so():
    engine = FakeEngine("a", RequestOutput(text="b", finish_reason=FinishReason.LENGTH))
    typist = run(engine, Typist("one", "two"))
    assert "length limit" in typist.seen[2] and said(engine)[1] == ["one", "ab", "two"]


def test_what_got_no_answer_is_offered_again_and_not_remembered():
    engine = FakeEngine("a", GenerationFailed("坏了。", "It broke."))
    typist = run(engine, Typist("one"))
    assert typist.seen == ["a", "It broke."] and typist.drafts == ["", "one"]
    engine.script = ("good",)
    engine.refuse = ContextOverflow("太长。", "Too long.")
    assert run(engine, Typist("two"), "zh").seen == ["太长。"]
    engine.refuse = None
    run(engine, Typist("three"))
    assert said(engine)[-1] == ["three"]


def test_an_unknown_command_is_not_sent():
    engine = FakeEngine("a")
    typist = run(engine, Typist("/hlep", " /hlep"))
    assert "/hlep" in typist.seen[0] and typist.drafts == ["", "/hlep", ""] and said(engine) == [[" /hlep"]]


def test_prefix_command_and_help():
    engine = FakeEngine("a")
    typist = run(engine, Typist("/prefix 当然，", "one", "/prefix", "two", "/help"), "zh")
    assert [request.answer_prefix for request in engine.requests] == ["当然，", ""]
    assert "当然，" in typist.seen[0] and "/prefix" in typist.seen[-1]


def ask(url, question="two", engine_says=None, language="en"):
    """One question after one round, through HTTP; returns (text, finish reason)."""
    conversation = Conversation(RemoteServer(url, language).submit, PARAMS, prefix="Sure: ")
    conversation._messages = (Message("user", "one"), Message("assistant", "1"))
    pieces: list[str] = []
    reply = conversation.ask(question, pieces.append, lambda: False)
    assert "".join(pieces) == reply.text
    return reply


def test_a_server_is_asked_as_the_engine_is():
    engine = FakeEngine("half a ", "pair: 😀", max_length=512)
    with live.serve(engine) as port:
        RemoteServer(f"http://127.0.0.1:{port}", "en").check()
        assert ask(f"http://127.0.0.1:{port}/") == ("Sure: half a pair: 😀", FinishReason.STOP)
    [request] = engine.requests
    assert [m.content for m in request.messages] == ["one", "1", "two"] and request.answer_prefix == "Sure: "
    assert request.overflow is Overflow.DROP_OLDEST
    assert request.params == SamplingParams(temperature=0.3, top_p=0.6, max_length=512)


@pytest.mark.parametrize(("language", "sentence"), [("zh", "太长。"), ("en", "Too long.")])
def test_the_servers_sentence_is_passed_on(language, sentence):
    engine = FakeEngine("a", GenerationFailed("太长。", "Too long."))
    with live.serve(engine) as port:
        for refuse in (None, ContextOverflow("太长。", "Too long.")):
            engine.refuse = refuse
            with pytest.raises(ServerError) as caught:
                ask(f"http://127.0.0.1:{port}", language=language)
            assert caught.value.text(language) == sentence


def test_interrupting_closes_the_connection():
    engine = FakeEngine("a", threading.Event(), "never")
    with live.serve(engine) as port:
        stream = RemoteServer(f"http://127.0.0.1:{port}", "en").submit(_request("one"))
        assert stream.get(live.TIMEOUT) == RequestOutput(text="a")
        stream.close()
        stream.close()
        assert stream.get(live.TIMEOUT).finish_reason is FinishReason.ABORT
        live.wait_for(engine.streams[0].closed.is_set)


def _request(question):
    requests = []
    engine = FakeEngine()
    Conversation(lambda r: requests.append(r) or engine.submit(r), PARAMS).ask(question, print, lambda: False)
    return requests[0]


@contextlib.contextmanager
def somebody(answer: bytes, *, hold: bool = False):
    """Somebody else's server, which says ``answer`` to every connection and hangs up unless it is to ``hold`` it."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                connection.recv(65536)
                connection.sendall(answer)
                held.append(connection) if hold else connection.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(live.TIMEOUT)
        for connection in held:
            connection.close()


def response(body: bytes, status: bytes = b"200 OK", kind: bytes = b"text/html") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body), body)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (response(b"<p>welcome to nginx"), "does not seem to be a ChatGLM server"),
        (response(b'["success"]'), "does not seem to be a ChatGLM server"),
        (response(b"", b"502 Bad Gateway"), "HTTP 502"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not seem to be a ChatGLM server"),
        (b"", "Cannot connect"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "does not seem to be a ChatGLM server"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 99\r\n\r\n{", "HTTP 500"),
    ],
)
def test_somebody_elses_server_is_found_at_the_start(answer, said):
    with somebody(answer) as url, pytest.raises(StartupError) as caught:
        RemoteServer(url, "en").check()
    assert said in caught.value.en and url in caught.value.en and url in caught.value.zh


def events(*lines: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + body + last


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (events(b'data: {"response": "a"}\n\n', last=b""), "broke in mid-answer"),
        (events(b'data: {"resp', last=b"5\r\nab"), "broke in mid-answer"),
        (events(b'data: {"text": "a"}\n\n'), "does not seem to be a ChatGLM server"),
        (events(b"data: [DONE]\n\n"), "does not seem to be a ChatGLM server"),
        (response(b'{"error": {"message": "no"}}', b"404 Not Found"), "HTTP 404"),
        (b"", "Cannot connect"),
    ],
)
def test_a_stream_that_is_not_what_it_should_be(answer, said):
    with somebody(answer) as url, pytest.raises(ServerError) as caught:
        ask(url)
    assert said in caught.value.en and url in caught.value.en and url in caught.value.zh


def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.2)
    with somebody(b"", hold=True) as url:
        with pytest.raises(StartupError, match="does not answer"):
            RemoteServer(url, "en").check()
        with pytest.raises(ServerError, match="does not answer"):
            ask(url)
    half = events(b'data: {"response": "a"}\n\n', last=b"")
    with somebody(half, hold=True) as url, pytest.raises(ServerError, match="broke in mid-answer"):
        ask(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:x", "http://", "http://a..b", "https://%"])
def test_impossible_addresses(url):
    with pytest.raises(StartupError, match="Cannot connect"):
        RemoteServer(url, "en").check()


def test_an_impossible_path():
    with somebody(b"") as url, pytest.raises(StartupError, match="Cannot connect"):
        RemoteServer(url + "/中", "en").check()


def test_a_server_behind_a_path():
    paths = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.wfile.write(response(b'{"message": "Server started", "success": true}'))

        def do_POST(self):
            paths.append(self.path)
            self.wfile.write(events(b'data: {"response": "a"}\n\n'))

        log_message = ANY

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{proxy.server_address[1]}/chatglm/"
        RemoteServer(url, "en").check()
        assert ask(url).text == "a"
        proxy.shutdown()
    assert paths == ["/chatglm/", "/chatglm/generate"]


def pipe(questions: str | bytes, *options: str, language="zh"):
    """``python -m server chat`` with its input from a pipe."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CHATGLM_")}
    data = questions if isinstance(questions, bytes) else questions.encode()
    done = subprocess.run(
        [sys.executable, "-m", "server", "chat", *options], input=data, capture_output=True, timeout=120, cwd=ROOT,
        env={**clean, "CHATGLM_LANG": language, "PYTHONUTF8": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_piped_questions_are_answered_plainly():
    engine = FakeEngine("好", "的")
    with live.serve(engine) as port:
        assert pipe("一\n\nclear\r\n二\n/prefix 嗯，\n三", "--url", f"http://127.0.0.1:{port}") == (
            0, "好的\n好的\n嗯，好的\n", "",
        )  # fmt: skip
    assert said(engine) == [["一"], ["二"], ["二", "好的", "三"]]


@pytest.mark.parametrize("encoded", ["你好\r\n".encode("gbk"), "\ufeff你好\r\n".encode()])
def test_piped_from_windows(encoded):
    engine = FakeEngine("a")
    with live.serve(engine) as port:
        assert pipe(encoded, "--url", f"http://127.0.0.1:{port}")[0] == 0
    assert said(engine) == [["你好"]]


def test_a_piped_question_that_fails_tells_so_and_the_others_are_answered():
    engine = FakeEngine("a")
    engine.refuse = ContextOverflow("太长。", "Too long.")
    with live.serve(engine) as port:
        assert pipe("one\ntwo\n", "--url", f"http://127.0.0.1:{port}") == (1, "\n\n", "太长。\n太长。\n")


def test_piped_to_the_model_in_this_process():
    code, answer, errors = pipe("你是谁？\n", "--model", "demo", "--temperature", "0", "--prefix", "嗯，")
    assert (code, errors) == (0, "") and answer.startswith("嗯，") and answer.count("\n") == 1


def test_no_server_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, answer, sentence = pipe("你好\n", "--url", f"http://127.0.0.1:{port}")
    assert (code, answer) == (2, "") and sentence.startswith("连不上") and sentence.count("\n") == 1


def test_no_torch_for_a_server_elsewhere():
    code = "import sys; from server.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    with live.serve(FakeEngine("a")) as port:
        command = [sys.executable, "-c", code, "chat", "--url", f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, input="hello", capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout == "a\nFalse\n"

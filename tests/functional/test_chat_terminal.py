"""The real chat in a real terminal, with the demo model and with a server whose answers follow a script."""

import contextlib
import re
import signal
import subprocess
import sys
import threading

import pytest

from server.errors import ContextOverflow, GenerationFailed
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine
from tests.functional import live

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals of this kind", allow_module_level=True)

from tests.functional.chat_terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, ChatTerminal


@contextlib.contextmanager
def chat_with(engine, *options, **settings):
    """A chat with a server of that engine, in front of its first prompt."""
    with live.serve(engine) as port, ChatTerminal("--url", f"http://127.0.0.1:{port}", *options, **settings) as chat:
        chat.wait_for("(You:|用户：)$")
        yield chat


def said(engine, index=-1):
    return [message.content for message in engine.requests[index].messages]


def test_the_model_in_this_process():
    with ChatTerminal("--model", "demo", "--temperature", "0", language="zh") as chat:
        chat.wait_for(r"欢迎使用 demo 模型。\n.*clear 清空对话历史，stop 终止程序.*\n\n用户：$")
        assert "档位：cpu" in chat.shown and "另保留对话：0 段" in chat.shown
        chat.type("你是谁？" + ENTER)
        chat.wait_for(r"用户：你是谁？\n\nChatGLM：我是 chatglm-portable 自带的演示模型[^\n]*\n([^\n]+\n)?\n用户：$")
        chat.type("用英文怎么说？" + ENTER)
        chat.wait_for("ChatGLM：In English: I am the tiny demo model")  # of what was said before
        chat.wait_for("用户：$")
        chat.type("/prefix 当然，" + ENTER)
        chat.wait_for("以“当然，”开头。\n\n用户：$")
        chat.type("怎么下载真正的模型？" + ENTER)
        chat.wait_for(r"ChatGLM：当然，\S[^\n]*\n([^\n]+\n)*\n用户：$")
        chat.type("讲个故事" + ENTER)
        chat.wait_for("讲个故事\n\nChatGLM：当然，")
        chat.type(CTRL_C)  # of a small model the answer may be over by now
        chat.wait_for(r"(已停止|要退出)[^\n]*\n\n用户：$")
        chat.type("clear" + ENTER)
        chat.wait_for(r"^欢迎使用 demo 模型。\n[^\n]*\n\n用户：$")
        assert "tokens/s" not in chat.raw.decode()  # the engine's log
        chat.type("stop" + ENTER)
        assert chat.exit_code() == 0


def test_a_question_that_is_too_long_for_the_model():
    with ChatTerminal("--model", "demo", "--max-length", "64") as chat:
        chat.wait_for("You:$")
        chat.type("long " * 60 + ENTER)
        chat.wait_for(r"too long: \d+ tokens, and at most 51")
        chat.wait_for(r"You: [long \n]{300,}$")  # to be made shorter
        chat.type(CTRL_C)
        chat.wait_for("You:$")
        for hello in ("hello", "hi", "hey"):  # together too long, so that the oldest are dropped
            chat.type(hello + ENTER)
            chat.wait_for(rf"You: {hello}\n\nChatGLM: \S[^@]*\n\nYou:$")


def test_history_is_sent_and_cleared():
    engine = FakeEngine("answer ", "text")
    with chat_with(engine) as chat:
        chat.ask("one", "answer text")
        chat.ask("two", "answer text")
        assert said(engine) == ["one", "answer text", "two"]
        chat.type("clear" + ENTER)
        chat.wait_for(r"^Connected to http://127[^\n]*\n[^\n]*\n\nYou:$")
        chat.ask("three", "answer text")
        assert said(engine) == ["three"]


def test_answers_come_as_they_are_made():
    more = threading.Event()
    engine = FakeEngine("你好，", more, "世界")
    with chat_with(engine, language="zh") as chat:
        chat.type("您好" + ENTER)
        chat.wait_for("用户：您好\n\nChatGLM：你好，$")
        more.set()
        chat.wait_for("ChatGLM：你好，世界\n\n用户：$")


def test_ctrl_c_stops_the_answer_and_keeps_what_has_come():
    engine = FakeEngine("the beginning", threading.Event(), "never said")
    with chat_with(engine) as chat:
        chat.type("one" + ENTER)
        chat.wait_for("ChatGLM: the beginning$")
        chat.type(CTRL_C)
        chat.wait_for(r"the beginning\n\(stopped; [^\n]*\)\n\nYou:$")
        live.wait_for(engine.streams[0].closed.is_set)
        engine.script = ("and more",)
        chat.ask("go on", "and more")
        assert said(engine) == ["one", "the beginning", "go on"]


def test_ctrl_c_before_the_answer_gives_the_question_back():
    engine = FakeEngine(threading.Event())
    with chat_with(engine) as chat:
        chat.type("what is teh time?" + ENTER)
        live.wait_for(lambda: engine.streams)
        chat.type(CTRL_C)
        chat.wait_for(r"stopped before[^\n]*\n\nYou: what is teh time\?$")
        live.wait_for(engine.streams[0].closed.is_set)


def test_ctrl_c_at_the_prompt_tells_how_to_leave():
    engine = FakeEngine("answer")
    with chat_with(engine) as chat:
        chat.type("half a quest" + CTRL_C)
        chat.wait_for("half a quest\n\nYou:$")
        chat.type(CTRL_C)
        chat.wait_for(r"type stop[^\n]*\n\nYou:$")
        chat.ask("one", "answer")
        assert said(engine) == ["one"]
        chat.type(CTRL_C)
        chat.wait_for(r"answer\n\nYou:\nTo leave, type stop[^\n]*\n\nYou:$")
        chat.type(CTRL_C)
        assert chat.exit_code() == 0


@pytest.mark.parametrize("leave", [CTRL_D, "quit" + ENTER])
def test_leaving(leave):
    with chat_with(FakeEngine("answer")) as chat:
        chat.type(leave)
        assert chat.exit_code() == 0


def test_a_paste_is_one_question_and_can_be_edited():
    engine = FakeEngine("answer")
    with chat_with(engine) as chat:
        chat.paste("def f():\n    return 1\n你好")
        chat.wait_for(r"You: def f\(\):\n         return 1\n     你好$")
        assert not engine.requests
        chat.type("！" + ENTER)
        chat.wait_for("answer\n\nYou:$")
        assert said(engine) == ["def f():\n    return 1\n你好！"]


def test_new_lines_can_be_typed():
    engine = FakeEngine("answer")
    with chat_with(engine) as chat:
        chat.type("one\\" + ENTER)
        chat.type("two" + ALT_ENTER + "three" + ENTER)
        chat.wait_for("answer\n\nYou:$")
        assert said(engine) == ["one\ntwo\nthree"]


def test_earlier_questions_come_back_with_the_arrow_key():
    engine = FakeEngine("answer")
    with chat_with(engine) as chat:
        chat.ask("first", "answer")
        chat.ask("second", "answer")
        chat.type(UP + UP)
        chat.wait_for("You: first$")


def test_wide_characters_are_deleted_whole():
    engine = FakeEngine("answer")
    with chat_with(engine, language="zh") as chat:
        chat.type("你好吗\x7f\x7f们")
        chat.wait_for("用户：你们$")
        chat.type("\x1b[D他" + ENTER)  # one to the left
        chat.wait_for("answer\n\n用户：$")
        assert said(engine) == ["你他们"]


def test_what_is_typed_and_pasted_while_an_answer_comes_waits_for_the_prompt():
    more = threading.Event()
    engine = FakeEngine("begin", more, "end")
    with chat_with(engine) as chat:
        chat.type("one" + ENTER)
        chat.wait_for("ChatGLM: begin$")
        chat.type("see: ")
        chat.paste("x\ny\n")
        chat.type("z")
        more.set()
        chat.wait_for("ChatGLM: beginend\n\nYou: see: x\n     y\n     z$")
        chat.type(ENTER)
        chat.wait_for("You:$")
        assert said(engine)[-1] == "see: x\ny\nz"


def test_prefix():
    engine = FakeEngine("sunny.")
    with chat_with(engine, "--prefix", "Sure, ") as chat:
        chat.ask("weather?", "Sure, sunny.")
        chat.type("/prefix" + ENTER)
        chat.wait_for("no fixed beginning")
        chat.ask("weather?", "sunny.")
        chat.type("/prefix Well, " + ENTER)
        chat.wait_for('start with "Well, "')
        chat.ask("weather?", "Well, sunny.")
    assert [request.answer_prefix for request in engine.requests] == ["Sure, ", "", "Well, "]


def test_control_characters_of_an_answer_are_not_carried_out():
    with chat_with(FakeEngine("a\x1b[2Jb")) as chat:
        chat.type("one" + ENTER)
        chat.wait_for(r"You: one\n\nChatGLM: a\S+2Jb\n\nYou:$")


@pytest.mark.parametrize(
    ("script", "refuse", "sentence"),
    [
        (("so far",), ContextOverflow("太长。", "Far too long."), "Far too long."),
        (("so far", GenerationFailed("坏了。", "It broke.")), None, "so far\nIt broke."),
    ],
)
def test_a_failed_question_can_be_asked_again(script, refuse, sentence):
    engine = FakeEngine(*script)
    engine.refuse = refuse
    with chat_with(engine) as chat:
        chat.type("one" + ENTER)
        chat.wait_for(re.escape(sentence) + "\n\nYou: one$")
        engine.refuse, engine.script = None, ("good",)
        chat.type(" more" + ENTER)
        chat.wait_for("ChatGLM: good\n\nYou:$")
        assert said(engine) == ["one more"]


SERVER = """
import sys, threading
from tests.fake_engine import FakeEngine
from tests.functional import live
with live.serve(FakeEngine("the beginning", threading.Event())) as port:
    print(port, flush=True)
    sys.stdin.read()
"""


def test_a_server_that_dies_in_mid_answer_and_comes_back():
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        port = int(server.stdout.readline())
        with ChatTerminal("--url", f"http://127.0.0.1:{port}/") as chat:
            chat.wait_for("You:$")
            chat.type("one" + ENTER)
            chat.wait_for("ChatGLM: the beginning$")
            server.send_signal(signal.SIGKILL)
            chat.wait_for(r"beginning\nThe connection to http://127[^\n]* broke[^Y]*ask again\.\n\nYou: one$")
            chat.type(ENTER)
            chat.wait_for(r"Cannot connect to http://[^Y]*running\.\n\nYou: one$")
            with live.serve(FakeEngine("again here"), port=port):
                chat.type(ENTER)
                chat.wait_for("ChatGLM: again here\n\nYou:$")
    finally:
        server.kill()
        server.communicate()

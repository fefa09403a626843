"""GLM-API's documented TypeScript client."""

import itertools

import pytest

from server.core import Message
from tests.fake_engine import FakeEngine
from tests.functional.live import serve

MESSAGES = [
    {"role": "system", "content": "请用中文。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "谢谢"},
    {"role": "assistant", "content": "不客气。"},
    {"role": "user", "content": "你是谁？"},
]
ROUNDS = [["请用中文。\n你好\n", "你好！"], ["谢谢\n", "不客气。"]]


@pytest.fixture
def glm(node):
    """``glm(port, function, *args)`` calls a function of the client."""
    return lambda port, function, *args: node(
        "glm_api.ts", function, *args, env={"GLM_API": f"http://127.0.0.1:{port}"}
    )


def test_rounds_in_one_flat_list_are_read_as_a_conversation(glm):
    engine = FakeEngine("我是", "演示。")
    with serve(engine) as port:
        whole = glm(port, "chat", MESSAGES)
        events = glm(port, "chatStream", MESSAGES)
    assert whole["content"] == events[-1]["content"] == "我是演示。"
    said = [*itertools.chain(*ROUNDS), "你是谁？\n"]
    roles = itertools.cycle(["user", "assistant"])
    expected = tuple(Message(role, text) for role, text in zip(roles, said, strict=False))
    assert [request.messages for request in engine.requests] == [expected] * 2


def test_a_conversation_with_the_demo_model(program, glm):
    options = {"temperature": 0}
    whole = glm(program.port, "chat", MESSAGES, options)
    assert whole["content"] == program.ask("你是谁？\n", history=ROUNDS)
    assert whole["total_tokens"] == whole["prompt_tokens"] + whole["completion_tokens"] > whole["prompt_tokens"] > 0
    assert (whole["model"], whole["object"]) == ("demo", "chat.completion")
    events = glm(program.port, "chatStream", MESSAGES, options)
    assert len(events) > 3 and events[-1] == whole
    contents = [event["content"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(contents))


def test_a_first_question_has_no_history(program, glm):
    assert glm(program.port, "chat", MESSAGES[-1:], {"temperature": 0})["content"] == program.ask("你是谁？\n")


def test_tokenize(program, glm):
    answer = glm(program.port, "tokenize", "你好 world")
    assert "".join(answer["tokens"]).replace("▁", " ").strip() == "你好 world"
    assert len(answer["tokenIds"]) == len(answer["tokens"]) + 2  # ChatGLM2's two special tokens


def test_embedding(glm):
    with serve(FakeEngine()) as port:
        answer = glm(port, "embedding", ["hello world", "你好"])
    assert answer == {
        "data": [[11, pytest.approx(0.1)], [2, pytest.approx(0.1)]],
        "model": "fake-text2vec",
        "object": "embedding",
    }

"""What a client of OpenAI's protocol may get wrong, and the sentence and the field's name that it hears."""

import json

import pytest
from pydantic import ValidationError

from server.api.app import create_app
from server.api.dialect import ApiSettings
from server.api.routing import by_path
from tests.fake_engine import FakeEngine

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BASE = {CHAT: {"messages": [{"role": "user", "content": "q"}]}, TEXT: {"prompt": "p"}, EMBEDDINGS: {"input": "t"}}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}

DEEP = {"a": []}
for _ in range(65):
    DEEP = {"a": [DEEP]}


def called(arguments):
    return [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}, USER]


def tool(**function):
    return [{"type": "function", "function": function}]


# fields, the name of the wrong one, what is said of it in Chinese and English; {} stands for its name
SHARED = [
    (
        {"temperature": 2.5},
        "temperature",
        "{} 应为不小于 0、不大于 2 的数，收到的是 2.5。",
        "{} must be a number of at least 0 and at most 2, but 2.5 was given.",
    ),
    ({"n": 0}, "n", None, "{} must be a number of at least 1 and at most 128, but 0 was given."),
    ({"n": 129}, "n", None, "{} must be a number of at least 1 and at most 128, but 129 was given."),
    ({"n": 10**15}, "n", None, None),
    ({"frequency_penalty": -3}, "frequency_penalty", None, None),
    ({"seed": 2**63}, "seed", None, None),
    ({"max_tokens": -2}, "max_tokens", None, "{} must be a number of at least -1, but -2 was given."),
    ({"stream": "maybe"}, "stream", None, '{} must be true or false, but "maybe" was given.'),
    (
        {"stream_options": [True]},
        "stream_options",
        "{} 应为对象，收到的是一个数组。",
        "{} must be an object, but an array was given.",
    ),
    (
        {"stream_options": {"include_usage": "x"}},
        "stream_options.include_usage",
        None,
        '{} must be true or false, but "x" was given.',
    ),
    (
        {"stop": 5},
        "stop",
        "{} 应为字符串或字符串数组，收到的是 5。",
        "{} must be a string or an array of strings, but 5 was given.",
    ),
    ({"stop": ["a", 5]}, "stop[1]", None, "{} must be a string, but 5 was given."),
    ({"stop": ["a"] * 33}, "stop", "{} 有 33 项，最多允许 32 项。", "{} has 33 elements; at most 32 are allowed."),
    ({"stop": "\ud800"}, "stop[0]", None, "{} holds half of a surrogate pair."),
    ({"logit_bias": [5]}, "logit_bias", None, "{} must be an object, but an array was given."),
    (
        {"logit_bias": {"a": 5}},
        "logit_bias",
        '{} 的键 应为整数，收到的是 "a"。',
        'a key of {} must be a whole number, but "a" was given.',
    ),
    (
        {"logit_bias": {"x" * 99: 5}},
        "logit_bias",
        None,
        'a key of {} must be a whole number, but "' + "x" * 40 + '…" was given.',
    ),
    (
        {"logit_bias": {"5": 100.5}},
        "logit_bias.5",
        "{} 应为不大于 100 的数，收到的是 100.5。",
        "{} must be a number of at most 100, but 100.5 was given.",
    ),
    ({"logit_bias": {"5": True}}, "logit_bias.5", None, "{} must be a number, but true was given."),
    (
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "logit_bias",
        "{} 有 1025 项，最多允许 1024 项。",
        "{} has 1025 elements; at most 1024 are allowed.",
    ),
    ({"model": 5}, "model", None, "{} must be a string, but 5 was given."),
]

CHATS = [
    ({"messages": None}, "messages", "缺少字段 {}。", "The field {} is missing."),
    ({"messages": "q"}, "messages", None, '{} must be an array, but "q" was given.'),
    ({"messages": []}, "messages", "{} 有 0 项，至少要有 1 项。", "{} has 0 elements; it needs at least 1."),
    ({"messages": [USER, None]}, "messages[1]", None, "{} must be an object, but null was given."),
    ({"messages": [USER, "q"]}, "messages[1]", "{} 应为对象，收到的是 \"q\"。", None),
    ({"messages": [{"content": "q"}]}, "messages[0].role", "缺少字段 {}。", "The field {} is missing."),
    (
        {"messages": [USER, {"role": "bot", "content": "q"}]},
        "messages[1].role",
        "{} 应为 'system'、'developer'、'user'、'assistant'、'tool' 或 'function'，收到的是 \"bot\"。",
        "{} must be 'system', 'developer', 'user', 'assistant', 'tool' or 'function', but \"bot\" was given.",
    ),
    ({"messages": [USER, {"role": "tool"}]}, "messages[1].content", "缺少字段 {}。", "The field {} is missing."),
    (
        {"messages": [{"role": "user", "content": {}}]},
        "messages[0].content",
        "{} 应为字符串或数组，收到的是一个对象。",
        "{} must be a string or an array of parts, but an object was given.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages[0].content[1].type",
        "{}：这个模型只读文字，不支持 image_url。",
        "{}: this model reads text only, not image_url.",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        None,
        "The field {} is missing.",
    ),
    (
        {"messages": [{"role": "user", "content": ["a"]}]},
        "messages[0].content[0]",
        None,
        '{} must be an object, but "a" was given.',
    ),
    (
        {"messages": [{"role": "user", "content": "\ud83d"}]},
        "messages[0].content",
        "{} 中有半个代理对字符。",
        "{} holds half of a surrogate pair.",
    ),
    (
        {"messages": called("[1]")},
        "messages[1].tool_calls[0].function.arguments",
        "{} 应为一个 JSON 对象的文本，收到的是 \"[1]\"。",
        '{} must be the text of a JSON object, but "[1]" was given.',
    ),
    (
        {"messages": called("{")},
        "messages[1].tool_calls[0].function.arguments",
        "{}：JSON 有误：第 1 行第 2 列附近应有用双引号括起来的键。",
        None,
    ),
    ({"messages": called('{"a": "\\ud800"}')}, "messages[1].tool_calls[0].function.arguments", None, None),
    (
        {"messages": called("{}")[:2]},
        "messages",
        "最后一条消息要求调用工具，后面应有工具的结果（role 为 tool）。",
        "The last message asks for tools; their results must follow it (role tool).",
    ),
    (
        {"continue_final_message": True},
        "continue_final_message",
        None,
        "With {} the last message must be an assistant's.",
    ),
    ({"top_logprobs": 1}, "top_logprobs", "{} 需要 logprobs 为 true。", "{} needs logprobs to be true."),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None, None),
    ({"logprobs": 5}, "logprobs", None, "{} must be true or false, but 5 was given."),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.type",
        "{}：不支持 json_schema：只有 text，请在提问里说明要什么格式。",
        "{}: json_schema is not supported, only text; describe the format in the question.",
    ),
    (
        {"tools": [{"type": "custom", "custom": {}}]},
        "tools[0].type",
        "{} 应为 'function'，收到的是 \"custom\"。",
        "{} must be 'function', but \"custom\" was given.",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function", None, "The field {} is missing."),
    (
        {"tools": tool(name="get weather")},
        "tools[0].function.name",
        "{}：应为 1 到 64 个字母、数字、_、. 或 -。",
        "{}: 1 to 64 letters, digits and characters of _.- are allowed.",
    ),
    ({"tools": tool(name="f", parameters=DEEP)}, "tools[0].function.parameters", "{}：嵌套超过 64 层。", None),
    (
        {"messages": called(json.dumps(DEEP))},
        "messages[1].tool_calls[0].function.arguments",
        None,
        "{}: it is nested more than 64 levels deep.",
    ),
    ({"tools": tool(name="f\n")}, "tools[0].function.name", None, None),
    ({"functions": [{"name": "f", "parameters": []}]}, "functions[0].parameters", None, None),
    (
        {"tools": tool(name="f", parameters={"a": ["\ud800"]})},
        "tools[0].function.parameters",
        None,
        "{} holds half of a surrogate pair.",
    ),
    (
        {"tools": tool(name="f"), "tool_choice": "f"},
        "tool_choice",
        "{} 应为 none、auto、required 或一个对象，收到的是 \"f\"。",
        '{} must be none, auto, required or an object that names a function, but "f" was given.',
    ),
    ({"tool_choice": {"function": {}}}, "tool_choice.function.name", None, "The field {} is missing."),
    (
        {"tools": tool(name="f"), "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "{} 要求调用的函数不在请求给出的工具里。",
        "{} asks for a function that is not among the tools of the request.",
    ),
    ({"tool_choice": "required"}, "tool_choice", None, None),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call", None, None),
    ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call", None, None),
]

TEXTS = [
    ({"prompt": None}, "prompt", "缺少字段 {}。", "The field {} is missing."),
    (
        {"prompt": 5},
        "prompt",
        "{} 应为文本、token id 数组，或由它们组成的数组，收到的是 5。",
        "{} must be a text, token ids or an array of either, but 5 was given.",
    ),
    ({"prompt": []}, "prompt", None, "{} has 0 elements; it needs at least 1."),
    ({"prompt": ["a", 5]}, "prompt[1]", None, "{} must be a string, but 5 was given."),
    ({"prompt": [5, "a"]}, "prompt[1]", None, '{} must be a whole number, but "a" was given.'),
    ({"prompt": [5, -1]}, "prompt[1]", None, "{} must be a number of at least 0, but -1 was given."),
    ({"prompt": [[5], []]}, "prompt[1]", None, "{} has 0 elements; it needs at least 1."),
    ({"prompt": [[5], [5.5]]}, "prompt[1][0]", None, "{} must be a whole number, but 5.5 was given."),
    ({"prompt": ["a"] * 2049}, "prompt", None, "{} has 2049 elements; at most 2048 are allowed."),
    ({"prompt": ["a", "\ud800"]}, "prompt[1]", None, "{} holds half of a surrogate pair."),
    (
        {"prompt": ["a"] * 1025, "n": 2},
        "n",
        "这个请求要生成 2050 个回答，最多允许 2048 个。",
        "This request is for 2050 answers; at most 2048 are allowed.",
    ),
    (
        {"prompt": ["a" * 2**18, "b" * (2**18 + 1)], "echo": True, "logprobs": 0},
        "prompt",
        "带 echo 和 logprobs 时 {} 合计（乘以 n）最多 524288 个字符或 token，收到 524289 个。请分批。",
        "With echo and logprobs the {}s may have 524288 characters or token ids in all (times n), but they have "
        "524289; send them in several requests.",
    ),
    ({"logprobs": 6}, "logprobs", None, "{} must be a number of at least 0 and at most 5, but 6 was given."),
    ({"n": 2, "best_of": 3}, "best_of", "{} 只能等于 n。", "{} can only be equal to n."),
    ({"suffix": "x"}, "suffix", "不支持 {}：模型只会往后写。", "{} is not supported: the model only writes on."),
]

VECTORS = [
    ({"input": None}, "input", "缺少字段 {}。", "The field {} is missing."),
    ({"input": {}}, "input", None, "{} must be a string or an array of strings, but an object was given."),
    ({"input": []}, "input", None, "{} has 0 elements; it needs at least 1."),
    ({"input": ["a", 5]}, "input[1]", None, "{} must be a string, but 5 was given."),
    (
        {"input": [5]},
        "input",
        None,
        "{}: only texts are accepted here, no token ids (in LangChain, set check_embedding_ctx_length=False).",
    ),
    ({"input": ["a"] * 2049}, "input", None, "{} has 2049 elements; at most 2048 are allowed."),
    ({"encoding_format": "int8"}, "encoding_format", None, "{} must be 'float' or 'base64', but \"int8\" was given."),
    (
        {"dimensions": 3},
        "dimensions",
        "{} 只能是 2，这是向量模型的宽度。",
        "{} can only be 2, the width of the embedding model.",
    ),
]

CASES = [
    (path, *case)
    for path, cases in ((CHAT, SHARED + CHATS), (TEXT, SHARED + TEXTS), (EMBEDDINGS, VECTORS))
    for case in cases
]


@pytest.mark.parametrize(("path", "fields", "field", "zh", "en"), CASES)
def test_wrong_fields(path, fields, field, zh, en):
    client = create_app(FakeEngine("a"), ApiSettings()).test_client()
    for language, sentence in (("zh-CN", zh), ("en", en)):
        body = json.dumps(BASE[path] | fields)
        response = client.post(path, data=body, headers={"Accept-Language": language})
        error = response.json["error"]
        assert (response.status_code, list(error)) == (400, ["message", "type", "param", "code"])
        assert (error["type"], error["param"]) == ("invalid_request_error", field)
        assert sentence is None or error["message"] == sentence.replace("{}", field)


MANY = 2000
NESTED = [
    (CHAT, {"messages": [{"role": "user", "content": [0] * MANY}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "a"}] * MANY}] * MANY}),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}] * MANY}),
    (TEXT, {"prompt": [["a"] * MANY] * MANY}),
    (TEXT, {"prompt": ["a", *[0] * MANY]}),
    (CHAT, {"logit_bias": {f"a{i}": "b" for i in range(MANY)}}),
    (TEXT, {"logit_bias": {f"a{i}": "b" for i in range(MANY)}}),
]


@pytest.mark.parametrize(("path", "fields"), NESTED)
def test_no_more_than_the_first_of_many_wrong_elements_is_looked_at(path, fields):
    [(_, route)] = by_path()[path]
    with pytest.raises(ValidationError) as caught:
        route.fields.model_validate(BASE[path] | fields)
    assert caught.value.error_count() == 1


def test_nothing_reaches_the_engine_of_a_request_that_is_refused():
    engine = FakeEngine("a")
    client = create_app(engine, ApiSettings()).test_client()
    for path, fields, *_ in CASES:
        client.post(path, data=json.dumps(BASE[path] | fields))
    assert not engine.requests


@pytest.mark.parametrize("path", [CHAT, TEXT, EMBEDDINGS])
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff\xff", b'{"a": ' + b"[" * 100_000 + b"}"])
def test_bodies(path, body):
    response = create_app(FakeEngine("a"), ApiSettings()).test_client().post(path, data=body)
    assert response.status_code == 400 and response.json["error"]["type"] == "invalid_request_error"

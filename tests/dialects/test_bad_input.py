"""What a client may get wrong, and the status and the sentence that it hears."""

import pytest
from pydantic import ValidationError

from server.api.app import create_app, language_of
from server.api.dialect import ApiSettings
from server.api.dialects import glm_api, my_chatglm2, official, web_stream
from server.api.messages import json_reason
from server.api.openapi import template
from server.api.routing import by_path
from tests.fake_engine import FakeEngine

DEEP = "[" * 100_000
SHORTENED = 'max_length must be a whole number of at least 1, but "{}…" was given.'

# field, JSON text of its value, the sentences in Chinese and English
FIELDS = [
    ("query", "123", "query 应为字符串，收到的是 123。", "query must be a string, but 123 was given."),
    ("query", "{}", "query 应为字符串，收到的是一个对象。", "query must be a string, but an object was given."),
    ("query", '"\\ud800"', "query 中有半个代理对字符。", "query holds half of a surrogate pair."),
    (
        "max_length",
        "0",
        "max_length 应为不小于 1 的数，收到的是 0。",
        "max_length must be a number of at least 1, but 0 was given.",
    ),
    ("max_length", "-5", None, "max_length must be a number of at least 1, but -5 was given."),
    ("max_length", '"abc"', None, 'max_length must be a whole number of at least 1, but "abc" was given.'),
    ("max_length", "1.5", None, "max_length must be a whole number of at least 1, but 1.5 was given."),
    ("max_length", "true", None, "max_length must be a whole number of at least 1, but true was given."),
    ("max_length", '""', None, 'max_length must be a whole number of at least 1, but "" was given.'),
    ("max_length", "[1]", None, "max_length must be a whole number of at least 1, but an array was given."),
    ("max_length", '"' + "x" * 99 + '"', None, SHORTENED.format("x" * 40)),
    ("max_length", '"' + "9" * 5000 + '"', None, SHORTENED.format("9" * 40)),
    ("max_length", '"\\ud800"', None, "max_length holds half of a surrogate pair."),
    ("max_length", "-" + "9" * 99, None, f"max_length must be a number of at least 1, but -{'9' * 39}… was given."),
    ("top_p", "1.01", None, "top_p must be a number of at least 0 and at most 1, but 1.01 was given."),
    ("top_p", "-1", None, "top_p must be a number of at least 0 and at most 1, but -1 was given."),
    ("top_p", "false", None, "top_p must be a number of at least 0 and at most 1, but false was given."),
    ("temperature", '"nan"', None, 'temperature must be a number of at least 0 and at most 2, but "nan" was given.'),
    (
        "temperature",
        '"1e999"',
        None,
        'temperature must be a number of at least 0 and at most 2, but "1e999" was given.',
    ),
    ("temperature", "1e300", None, "temperature must be a number of at least 0 and at most 2, but 1e+300 was given."),
    ("max_length", "1e300", None, "max_length must be a whole number of at least 1, but 1e+300 was given."),
    ("repetition_penalty", "0", "repetition_penalty 应为大于 0、不大于 2 的数，收到的是 0。", None),
    ("seed", "-1", None, "seed must be a number of at least 0 and at most 9223372036854775807, but -1 was given."),
    ("stream", '"maybe"', 'stream 应为 true 或 false，收到的是 "maybe"。', None),
    ("stream", "7", None, "stream must be true or false, but 7 was given."),
    ("history", "7", "history 应为数组，收到的是 7。", "history must be an array, but 7 was given."),
    ("history", '["a", "b"]', None, 'history[0] must be an array, but "a" was given.'),
    ("history", '[["a","b"],["a"]]', "history[1]：应成对给出问题和回答，收到的是 1 个元素。", None),
    (
        "history",
        '[["a","b","c"]]',
        None,
        "history[0]: questions and answers are expected in pairs, but there are 3 elements.",
    ),
    ("history", "[[]]", None, "history[0]: questions and answers are expected in pairs, but there are 0 elements."),
    ("history", '[["a","b"],["a","b"],["a","b"],["a",5]]', None, "history[3][1] must be a string, but 5 was given."),
    ("history", '[["a","\\ud83d"]]', None, "history[0][1] holds half of a surrogate pair."),
    ("history", '[["a",null]]', "history[0][1] 应为字符串，收到的是 null。", None),
    ("history", '[{"role":"user"}]', None, "history[0] must be an array, but an object was given."),
    ("history", '"[["', None, "history: The JSON is malformed at line 1, column 3: Expecting value."),
    ("history", '"{}"', None, "history must be an array, but an object was given."),
]

BODIES = [
    (b'{"query": "a"', "The JSON is malformed at line 1, column 14: Expecting ',' delimiter."),
    (b"{\n \"query\": 'a'}", "The JSON is malformed at line 2, column 11: Expecting value."),
    (b"query=a&stream=1", "The JSON is malformed at line 1, column 1: Expecting value."),
    (b'{"query": "a"} {}', "The JSON is malformed at line 1, column 16: Extra data."),
    (b'{"query": "a\n"}', "The JSON is malformed at line 1, column 13: Invalid control character at."),
    (b'["query"]', "The body must be one JSON object {...}."),
    (b'"query"', "The body must be one JSON object {...}."),
    (b"null", "The body must be one JSON object {...}."),
    (b'{"top_p": NaN}', "NaN is not allowed in JSON."),
    (b'{"unknown": -Infinity}', "-Infinity is not allowed in JSON."),
    (b'{"top_p": 1e999}', "The number 1e999 in the JSON is too large."),
    (b'{"seed": ' + b"9" * 5000 + b"}", "The JSON holds an integer with too many digits."),
    (b'{"a": ' + DEEP.encode() + b"}", "The JSON is nested too deeply."),
    (b'{"query": "\xff\xff"}', "The request is neither UTF-8 nor GBK."),
]


# what stands beside the message in the dialect's own errors; "time" is any
MY_CHATGLM2 = {"success": False}
GLM_API = {"object": "error"}
WEB_STREAM = {"query": "", "response": "", "history": [], "success": False}
OFFICIAL = {"response": "", "history": [], "status": 400, "time": "any"}

# path, whose it is, a request for it, and the fields of it that FIELDS tries
ASKING = [
    ("/generate", MY_CHATGLM2, {"query": '"q"'}, my_chatglm2.GenerateFields),
    ("/stream", MY_CHATGLM2, {"query": '"q"', "top_p": "1"}, my_chatglm2.StreamFields),
    ("/chat", GLM_API, {"prompt": '"q"'}, glm_api.ChatFields),
    ("/chat-stream", GLM_API, {"prompt": '"q"'}, glm_api.ChatFields),
    ("/chat", WEB_STREAM, {"query": '"q"'}, web_stream.ChatFields),
    ("/stream", WEB_STREAM, {"query": '"q"', "history": "[]"}, web_stream.ChatFields),
    ("/", OFFICIAL, {"prompt": '"q"'}, official.ChatFields),
]
# whose sentence it is if a path's body cannot be read
SHAPES = {
    **dict.fromkeys(["/generate", "/stream", "/interrupt", "/tokenize"], MY_CHATGLM2),
    **dict.fromkeys(["/chat", "/chat-stream", "/embedding"], GLM_API),
    "/clear": WEB_STREAM,
    "/": OFFICIAL,
}


def client(**settings):
    return create_app(FakeEngine("a"), ApiSettings(**settings)).test_client()


def answer(data, language="en", path="/generate", shape=MY_CHATGLM2, method="POST"):
    response = client().open(path, method=method, data=data, headers={"Accept-Language": language})
    assert response.status_code == 400
    body = dict(response.json)
    sentence = body.pop("message")
    assert body == {**shape, **{name: body[name] for name in shape if shape[name] == "any"}}
    return sentence


def wrong_fields():
    for path, shape, good, model in ASKING:
        for field, value, zh, en in FIELDS:
            name = "prompt" if field == "query" and "prompt" in good else field
            if name in model.model_fields:
                body = "{" + ", ".join(f'"{key}": {text}' for key, text in {**good, name: value}.items()) + "}"
                for language, sentence in (("zh-CN", zh), ("en", en)):
                    if sentence:
                        yield path, shape, body, language, sentence.replace(field, name)


@pytest.mark.parametrize(("path", "shape", "body", "language", "sentence"), list(wrong_fields()))
def test_fields(path, shape, body, language, sentence):
    assert answer(body, language, path, shape) == sentence


ROUTES = [(path, route) for path, candidates in by_path().items() for _, route in candidates]
MANY = 2000
MANY_WRONG = (
    *([wrong] * MANY for wrong in (0, {}, [], [{}] * MANY)),
    ["a", *[{}] * MANY],
    {f"a{i}": {} for i in range(MANY)},
)


@pytest.mark.parametrize(("path", "route"), ROUTES, ids=[f"{path} {route.fields.__name__}" for path, route in ROUTES])
def test_no_more_than_the_first_of_many_wrong_elements_is_looked_at(path, route):
    """One error takes microseconds; a body has room for millions."""
    for field in route.fields.model_fields:
        for value in MANY_WRONG:
            try:
                route.fields.model_validate({field: value})
            except ValidationError as error:
                assert sum(detail["loc"][0] == field for detail in error.errors()) <= 1


def test_what_is_wrong_with_json_in_chinese():
    said = answer("{'query':'你好'}", "zh")
    assert said == "JSON 有误：第 1 行第 2 列附近应有用双引号括起来的键。"
    for _, english in BODIES:
        reason = english.rpartition(": ")[2].rstrip(".")
        if english.startswith("The JSON is malformed"):
            assert json_reason(reason), reason


@pytest.mark.parametrize(("body", "sentence"), BODIES, ids=[sentence for _, sentence in BODIES])
@pytest.mark.parametrize("path", SHAPES)
def test_bodies(path, body, sentence):
    assert answer(body, path=path, shape=SHAPES[path]) == sentence


@pytest.mark.parametrize(("body", "sentence"), BODIES, ids=[sentence for _, sentence in BODIES])
@pytest.mark.parametrize("path", ["/chat", "/clear", "/score"])
def test_bodies_of_get(path, body, sentence):
    assert answer(body, path=path, shape=WEB_STREAM, method="GET") == sentence


@pytest.mark.parametrize(
    ("path", "shape", "field"),
    [
        ("/stream", MY_CHATGLM2, "query"),
        ("/tokenize", MY_CHATGLM2, "text"),
        ("/chat", GLM_API, "prompt"),
        ("/chat-stream", GLM_API, "prompt"),
        ("/embedding", GLM_API, "prompt"),
        ("/", OFFICIAL, "prompt"),
    ],
)
def test_missing_fields(path, shape, field):
    assert answer("", path=path, shape=shape) == f"The field {field} is missing."
    assert answer(f'{{"{field}": null}}', "zh", path, shape) == f"缺少字段 {field}。"


def test_missing_fields_of_get():
    for path, field in (("/chat", "query"), ("/score", "score")):
        assert answer("", "en", path, WEB_STREAM, "GET") == f"The field {field} is missing."
    assert answer('{"history": [], "query": null}', "zh", "/stream", WEB_STREAM) == "缺少字段 query。"


def test_bad_query_parameters():
    response = client().get("/generate?top_p=2&query=a", headers={"Accept-Language": "en"})
    assert response.status_code == 400
    assert response.json["message"] == 'top_p must be a number of at least 0 and at most 1, but "2" was given.'
    assert client().get("/generate?max_length=&query=").status_code == 200


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, "zh"),
        ("*", "zh"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh;q=0.8", "en"),
        ("de", "en"),
        ("ZH-hant", "zh"),
        ("zh;q=abc", "zh"),
    ],
)
def test_language(header, language):
    assert language_of(header or "", "zh") == language


def test_language_of_the_server_for_clients_that_name_none():
    message = client(language="en").post("/stream").json["message"]
    assert message == "The field query is missing."


def test_unknown_path():
    response = client().get("/v2/x", headers={"Accept-Language": "en"})
    assert response.status_code == 404
    paths = ", ".join([*map(template, by_path()), "/docs"])
    assert response.json["message"] == f"There is no /v2/x. There are: {paths}."


def test_double_slashes_of_a_base_url_that_ends_with_one():
    for path in ("/v1//chat/completions", "//chat//", "///"):
        fields = {"messages": [{"role": "user", "content": "q"}], "prompt": "q"}
        response = client().post(f"http://localhost{path}", json=fields)
        assert response.status_code == 200 and '"a"' in response.text
    assert client().get("http://localhost//generate?query=//").status_code == 200
    assert client().get("/v1//models").json["object"] == "list"


def test_wrong_method():
    response = client().get("/interrupt", headers={"Accept-Language": "en"})
    assert response.status_code == 405 and set(response.allow) == {"OPTIONS", "POST"}
    assert response.json["message"] == "/interrupt does not take GET. It takes: OPTIONS, POST."


def test_head_generates_nothing():
    engine = FakeEngine("a")
    app = create_app(engine, ApiSettings()).test_client()
    assert app.head("/generate?query=a").status_code == 200
    assert app.head("/chat?query=a").status_code == 200
    assert app.head("/").status_code == 200
    assert not engine.requests


def test_cors_on_answers_errors_and_preflights():
    origin = {"Origin": "http://192.168.1.9"}
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-stainless-os"}
    for path in by_path():
        response = client().options(path, headers={**origin, **wanted})
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Headers"] == "content-type, x-stainless-os"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
    for path in ("/", "/generate?query=a", "/generate?top_p=9", "/nowhere"):
        assert client().get(path, headers=origin).headers["Access-Control-Allow-Origin"] in ("*", origin["Origin"])
    for path in SHAPES:
        for body in ('{"query": "q", "prompt": "q", "text": "q"}', "["):
            response = client().post(path, data=body, headers=origin)
            assert response.status_code == (400 if body == "[" else 200)
            assert response.headers["Access-Control-Allow-Origin"] in ("*", origin["Origin"])
    other = client(cors_origins=("http://a",)).get("/", headers=origin)
    assert "Access-Control-Allow-Origin" not in other.headers


def test_unexpected_failure_tells_the_client_one_sentence_and_the_log_everything(caplog):
    engine = FakeEngine()
    engine.refuse = ZeroDivisionError("a secret")
    response = create_app(engine, ApiSettings(language="en")).test_client().post("/generate", json={"query": "q"})
    assert response.status_code == 500
    assert response.json == {"message": "Internal error; see the server's log.", "success": False}
    assert "a secret" in caplog.text and "Traceback" in caplog.text


def test_page_for_browsers_only():
    app = create_app(FakeEngine(), ApiSettings(addresses=("http://192.168.1.2:5178", "http://<b>"))).test_client()
    page = app.get("/", headers={"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"})
    assert page.content_type == "text/html; charset=utf-8"
    text = page.data.decode()
    assert "http://192.168.1.2:5178" in text and "fake-chatglm" in text and "<b>" not in text.split("地址")[1]
    assert "/generate?query=hello" in text and "http://&lt;b&gt;" in text
    for accept in ("application/json, text/plain, */*", "*/*", "", "application/json"):
        assert app.get("/", headers={"Accept": accept}).json == {"message": "Server started", "success": True}

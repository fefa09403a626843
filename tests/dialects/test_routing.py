"""Who answers on the paths that dialects share: their fields alone decide."""

import pytest

from server.api.routing import by_path, choose, dialect_for_path

ANSWERED_BY = [
    ("POST", "/stream", {"query": "q", "history": []}, "web-stream"),
    ("POST", "/stream", {"history": None, "query": None}, "web-stream"),
    ("POST", "/stream", {"query": "q"}, "my-chatglm2"),
    ("POST", "/stream", {"query": "q", "history": [], "top_p": 0.7}, "my-chatglm2"),
    ("POST", "/stream", {"history": [], "prompt": "q"}, "my-chatglm2"),
    ("POST", "/stream", {}, "my-chatglm2"),
    ("POST", "/chat", {"prompt": "q"}, "GLM-API"),
    ("POST", "/chat", {"prompt": "q", "history": [], "query": "q"}, "GLM-API"),
    ("POST", "/chat", {"query": "q", "history": []}, "web-stream"),
    ("POST", "/chat", {"history": []}, "GLM-API"),  # nobody's; the first one says what lacks
    ("GET", "/chat", {"query": "q"}, "web-stream"),
    ("GET", "/chat", {"prompt": "q"}, "web-stream"),
    ("POST", "/tokenize", {"text": "t", "return_tokens": True}, "my-chatglm2"),
    ("POST", "/tokenize", {"prompt": "t", "max_length": 4096}, "GLM-API"),
    ("POST", "/tokenize", {"text": "t", "prompt": "t"}, "my-chatglm2"),
    ("POST", "/tokenize", {}, "my-chatglm2"),
    ("GET", "/", {}, "my-chatglm2"),
    ("HEAD", "/", {}, "my-chatglm2"),
    ("POST", "/", {"prompt": "q"}, "official api.py"),
    ("POST", "/", {}, "official api.py"),
]


@pytest.mark.parametrize(("method", "path", "fields", "name"), ANSWERED_BY)
def test_fields_decide(method, path, fields, name):
    dialect, route = choose(by_path()[path], method, fields)
    assert dialect.name == name and route.path == path and method in route.methods


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "my-chatglm2"),
        ("/chat", "GLM-API"),
        ("/chat-stream/", "GLM-API"),
        ("/embedding/x", "GLM-API"),
        ("/clear", "web-stream"),
        ("/nowhere", "my-chatglm2"),
        ("", "my-chatglm2"),
        ("*", "my-chatglm2"),
    ],
)
def test_whose_shape_an_error_has_before_the_fields_are_known(path, name):
    assert dialect_for_path(path).name == name

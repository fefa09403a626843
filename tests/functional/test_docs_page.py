"""/docs and /openapi.json from a real server, and the page in a real browser without a network."""

import json

import pytest

from server.api import openapi
from server.api.docs import FILES
from server.api.webui import FOLDER
from tests.fake_engine import FakeEngine
from tests.functional import live
from tests.functional.browser import Browser


@pytest.fixture
def engine():
    return FakeEngine("你", "好")


@pytest.fixture
def port(engine):
    with live.serve(engine, version="1.2.3") as port:
        yield port


def test_document(port):
    status, headers, content = live.request(port, "GET", "/openapi.json")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    document = json.loads(content)
    assert document["info"] == openapi.document("1.2.3")["info"]
    assert "一键包" in content.decode() and "/v1/chat/completions" in document["paths"]


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_page_lets_nothing_be_loaded_from_elsewhere(port, path):
    status, headers, content = live.request(port, "GET", path)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
    assert b"http" not in content


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("docs.js", "text/javascript; charset=utf-8"),
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("swagger-ui-bundle.js.LICENSE.txt", "text/plain; charset=utf-8"),
        ("swagger-ui.css", "text/css; charset=utf-8"),
    ],
)
def test_files_of_the_page(port, name, content_type):
    status, headers, content = live.request(port, "GET", f"/docs/{name}")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, content_type, "no-cache")
    assert content == (FOLDER / FILES[name][0]).read_bytes()
    known = {"If-None-Match": headers["ETag"]}
    assert live.request(port, "GET", f"/docs/{name}", headers=known)[::2] == (304, b"")


def test_no_other_files_are_served(port):
    for path in ("/docs/index.html", "/docs/../index.html", "/docs/LICENSE", "/docs/%2e%2e/index.html"):
        assert live.request(port, "GET", path)[0] == 404


def test_front_page_links_to_it(port):
    content = live.request(port, "GET", "/", headers={"Accept": "text/html"})[2]
    assert b'<a href="/docs">' in content


def test_page_in_a_browser_without_a_network(port, engine, tmp_path):
    here = f"http://127.0.0.1:{port}"
    with Browser(tmp_path) as browser:
        browser.call("Page.navigate", url=f"{here}/docs#/my-chatglm2/post_generate")
        browser.wait_for("document.querySelectorAll('.opblock').length >= 20")
        text = browser.evaluate("document.body.innerText")
        assert "一个端口同时兼容" in text and "1.2.3" in text and "OAS 3.1" in text
        assert "/v1/chat/completions" in text

        # the deep link has opened POST /generate, with its example filled in
        block = "document.querySelector('#operations-my-chatglm2-post_generate')"
        filled = browser.wait_for(f"{block}.querySelector('textarea')?.value")
        assert json.loads(filled) == {"query": "你好"}
        browser.evaluate(f"{block}.querySelector('button.execute').click()")
        row = ".live-responses-table tbody .response-col_description"
        answer = browser.wait_for(f"{block}.querySelector({row!r})?.innerText")
        assert "你好" in answer and "x-request-id: request-1" in answer
        assert [message.content for message in engine.requests[0].messages] == ["你好"]
        assert f"{here}/generate" in browser.requested
        assert [url for url in browser.requested if not url.startswith((here, "data:", "about:"))] == []
        assert browser.complaints == []

"""The page / in two tabs, which share their storage, and without storage."""

import json
import threading

import pytest

from tests.functional import live
from tests.functional.chat_page import IDLE, NOTE, STORED, before_the_page

OTHER = "other.document.querySelector"


@pytest.fixture
def other(page):
    """Opens the conversation that ``page`` shows in another tab, the JavaScript variable ``other``."""

    def open_other():
        opening = "void (window.other = open(location.href))"
        page.browser.call("Runtime.evaluate", expression=opening, userGesture=True)
        page.until(f"{OTHER}('#list')?.children.length > 0 && !!{OTHER}('article')")

    yield open_other
    page.browser.evaluate("window.other?.close()")


def ask_other(page, text):
    page.browser.evaluate(f"{OTHER}('#question').value = '{text}'")
    page.browser.evaluate(f"{OTHER}('#send').click()")


def test_what_one_tab_says_the_other_knows(page, engine, other):
    page.answer_to("一")
    other()
    ask_other(page, "二")
    page.until("document.querySelectorAll('article').length === 2")
    page.until(f"{OTHER}('#stop').hidden")
    page.until("!document.querySelector('#send').disabled")
    page.answer_to("三")
    assert [message.content for message in engine.requests[2].messages if message.role == "user"] == ["一", "二", "三"]
    (stored,) = page.browser.evaluate(STORED)
    assert [round["question"] for round in json.loads(stored)["rounds"]] == ["一", "二", "三"]


def test_an_answer_on_its_way_in_the_other_tab(page, engine, other):
    hold = threading.Event()
    engine.script = ("一半", hold, "，全部")
    page.ask("问")
    page.until(f"{STORED}[0]?.includes('一半')")
    other()
    assert page.browser.evaluate(f"{OTHER}('.answer').innerText").strip() == "一半"
    assert page.browser.evaluate(f"{OTHER}('.note').innerText") == ""  # not that it was broken off
    ask_other(page, "插一句")
    page.browser.evaluate(f"{OTHER}('#new').click()")
    page.browser.evaluate(f"window.kept = {OTHER}('#list a')")
    saved = page.browser.evaluate(f"{STORED}[0]")
    page.until(f"{STORED}[0] !== {json.dumps(saved)}")
    assert page.browser.evaluate("kept.isConnected") is True  # not replaced under the pointer with each save
    page.browser.evaluate("other.history.back()")
    page.until(f"!!{OTHER}('article')")
    hold.set()
    page.until(IDLE)
    page.until(f"{OTHER}('.answer').innerText.trim() === '一半，全部' && !{OTHER}('#send').disabled")
    assert len(engine.requests) == 1


def test_deleted_in_the_other_tab(page, engine, other):
    engine.script = ("一半", threading.Event())
    page.ask("问")
    page.until(f"{STORED}[0]?.includes('一半')")
    other()
    page.browser.evaluate("other.confirm = () => true")
    page.browser.evaluate(f"{OTHER}('#list button').click()")
    page.until("!document.querySelector('article') && !document.querySelector('#send').disabled")
    live.wait_for(lambda: engine.streams[0].closed.is_set())
    assert page.browser.evaluate(STORED) == []


def test_a_tab_that_ended_without_a_word(page):
    lost = {"id": "x", "changed": 1, "rounds": [{"question": "问", "answer": "一半", "state": "running"}]}
    page.browser.evaluate(f"localStorage.setItem('conversation:x', JSON.stringify({json.dumps(lost)}))")
    page.open("#x")
    assert page.browser.evaluate(NOTE).startswith("页面关掉时")
    page.browser.evaluate("localStorage.setItem('conversation:y', '{}')")  # somebody else's
    page.open()
    assert page.browser.evaluate("document.querySelectorAll('#list a').length") == 1


def test_storage_that_is_switched_off(page, engine):
    off = before_the_page(
        page, "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('', 'SecurityError'); }});"
    )
    page.open()
    shown = page.answer_to("问")
    page.click("修改问题")
    page.browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=off)
    assert shown == "你好" and page.browser.complaints == []
    assert page.browser.evaluate("document.querySelector('#question').value") == "问"

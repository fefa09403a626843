"""What the page / shows to different readers: old browsers, small screens, long and odd answers."""

import time

import pytest

from tests.functional.chat_page import ANSWER, IDLE, before_the_page

LEFT = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('#log'))"


@pytest.fixture
def small_screen(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    yield
    browser.call("Emulation.clearDeviceMetricsOverride")


def test_browsers_that_do_not_know_has(page, engine):
    old = before_the_page(
        page,
        "const find = Element.prototype.querySelectorAll;"
        "Element.prototype.querySelectorAll = function (selector) {"
        "  if (selector.includes(':has(')) throw new SyntaxError('as Firefox 115 says');"
        "  return find.call(this, selector);"
        "};",
    )
    page.open()
    engine.script = ("```\n一行\n```",)
    page.answer_to("问")
    page.browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=old)
    assert page.browser.evaluate("document.querySelectorAll('.answer pre button').length") == 1
    assert page.browser.complaints == []


@pytest.mark.parametrize("how_far", [-20, -300])
def test_who_scrolls_up_while_an_answer_grows_stays_there(page, engine, how_far):
    engine.script = [step for _ in range(400) for step in ("一段话。\n\n", 0.02)]
    page.ask("长")
    page.until("document.querySelector('#log').scrollHeight > 2500")
    assert page.browser.evaluate(LEFT) < 1
    page.browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=500, y=200, deltaX=0, deltaY=how_far)
    page.until(f"{LEFT} > 600")
    place = page.browser.evaluate("document.querySelector('#log').scrollTop")
    time.sleep(0.3)
    assert page.browser.evaluate("document.querySelector('#log').scrollTop") == place
    page.browser.evaluate("document.querySelector('#log').scrollTop = 1e9")
    time.sleep(0.3)
    assert page.browser.evaluate(LEFT) < 1  # follows again
    page.browser.evaluate("document.querySelector('#log').scrollTop = 0")
    time.sleep(0.1)
    page.stop()
    page.until(IDLE)
    engine.script = ("短",)
    page.answer_to("这一问在最下面")
    page.until(f"{LEFT} < 1")


def test_answers_that_are_too_deep_are_shown_as_text(page, engine):
    engine.script = (">" * 6000,)
    assert page.answer_to("问") == ">" * 6000
    engine.script = ("**好**",)
    page.click("重新回答")
    page.until(f"{ANSWER} === '好'")


def test_code_that_is_continued_is_no_markdown(page, engine):
    code = "    # comment\n    return __name__ * 2\n"
    engine.script = (code,)
    question = "# language: Python\ndef f():\n"
    page.type(question)
    page.click("发送")
    page.until(IDLE)
    assert engine.requests[0].messages[0].content == question  # with its last line feed
    assert page.browser.evaluate("document.querySelector('.answer code').textContent").rstrip() == code.rstrip()
    page.click("＋ 新对话", "aside")
    engine.script = ("# 标题",)
    page.answer_to("# language 是什么？")
    assert page.browser.evaluate("document.querySelectorAll('.answer h1').length") == 1


def test_new_chat_greets_again(page):
    page.answer_to("问")
    page.click("＋ 新对话", "aside")
    assert page.browser.evaluate("document.querySelector('#empty').hidden") is False


def test_headings_and_tables(page, engine, small_screen):
    words = "internationalization | configuration | information | retrieval"
    engine.script = (f"# 标题\n\n| {words} |\n|---|---|---|---|\n| {words} |\n",)
    page.answer_to("问")
    style = page.browser.evaluate("getComputedStyle(document.querySelector('.answer h1'), '::before').content")
    assert style == "none"  # the dot is the header's
    lines = "document.querySelector('.answer td').getBoundingClientRect().height"
    assert page.browser.evaluate(lines) < 50  # no word is broken
    assert page.browser.evaluate("document.documentElement.scrollWidth") == 390


def test_menu_of_small_screens(page, small_screen):
    page.answer_to("问")
    shown = "getComputedStyle(document.querySelector('#side')).display === 'flex'"

    def tap(x, y):
        for what in ("mousePressed", "mouseReleased"):
            page.browser.call("Input.dispatchMouseEvent", type=what, x=x, y=y, button="left", clickCount=1)

    for close in (
        lambda: tap(370, 400),  # beside it
        lambda: page.browser.evaluate("document.querySelector('#list a').click()"),  # what is shown already
        lambda: page.browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape"),
    ):
        assert page.browser.evaluate(shown) is False
        tap(30, 25)
        assert page.browser.evaluate(shown) is True
        close()
    assert page.browser.evaluate(shown) is False
    assert page.browser.evaluate("document.querySelector('#list button').getAttribute('aria-label')") == "删除: 问"


def test_screen_readers_hear_an_answer_once(page, engine):
    engine.script = ("一半", 1.0)
    page.ask("问")
    page.until(f"{ANSWER} === '一半'")
    assert page.browser.evaluate("document.querySelector('article').getAttribute('aria-busy')") == "true"
    page.until(IDLE)
    assert page.browser.evaluate("document.querySelector('article').getAttribute('aria-busy')") == "false"


def test_the_hint_of_the_empty_field_is_whole(small_screen, page):
    hidden = "(field => field.scrollHeight - field.clientHeight)(document.querySelector('#question'))"
    assert page.browser.evaluate(hidden) <= 0


def test_enter_starts_a_line_where_the_keyboard_has_no_shift(small_screen, page, engine):
    page.browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.browser.call("Page.reload")
    page.until("matchMedia('(pointer: coarse)').matches && document.querySelector('#question')?.placeholder === '问题'")
    page.ask("一")
    assert page.browser.evaluate("document.querySelector('#question').value") == "一\n" and engine.requests == []
    page.browser.evaluate("document.querySelector('#send').click()")
    page.until(IDLE)
    page.browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert engine.requests[0].messages[0].content == "一"


def test_copy_button_stays_while_long_lines_are_scrolled(page, engine):
    engine.script = ("```\n" + "x" * 500 + "\n```",)
    page.answer_to("问")
    place = "document.querySelector('.answer pre button').getBoundingClientRect().right"
    before = page.browser.evaluate(place)
    page.browser.evaluate("document.querySelector('.answer pre code').scrollLeft = 300")
    assert page.browser.evaluate("document.querySelector('.answer pre code').scrollLeft") == 300
    assert page.browser.evaluate(place) == before

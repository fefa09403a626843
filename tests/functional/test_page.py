"""The page / in a real browser without a network, with a real server behind it."""

import threading

from server.errors import GenerationFailed, Overloaded
from tests.fake_engine import FakeEngine
from tests.functional import live
from tests.functional.chat_page import ANSWER, IDLE, NOTE, STORED, Page


def test_conversation_streams_and_is_kept(page, engine):
    hold = threading.Event()
    engine.script = ("你", hold, "好")
    page.ask("第一个问题")
    page.until(f"{ANSWER} === '你'")
    assert page.browser.evaluate("document.querySelector('#question').value") == ""
    hold.set()
    page.until(IDLE)
    assert page.browser.evaluate(ANSWER) == "你好"
    engine.script = ("第二个回答",)
    assert page.answer_to("第二个问题") == "第二个回答"
    roles = [(message.role, message.content) for message in engine.requests[1].messages]
    assert roles == [("user", "第一个问题"), ("assistant", "你好"), ("user", "第二个问题")]

    name = page.browser.evaluate("location.hash")
    page.open(name)
    assert page.until("document.querySelectorAll('article').length === 2")
    assert page.browser.evaluate(ANSWER) == "第二个回答"
    assert page.browser.evaluate("document.querySelector('#list a').textContent") == "第一个问题"
    assert page.browser.complaints == []
    assert all(url.startswith(page.here) for url in page.browser.requested if url != "about:blank")


def test_several_conversations(page, engine):
    page.answer_to("甲")
    page.click("＋ 新对话", "aside")
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 0
    page.answer_to("乙")
    assert len(engine.requests[1].messages) == 1
    titles = page.browser.evaluate("[...document.querySelectorAll('#list a')].map(one => one.textContent)")
    assert titles == ["乙", "甲"]
    page.browser.evaluate("document.querySelectorAll('#list a')[1].click()")
    page.until("document.querySelector('.question')?.textContent === '甲'")
    page.browser.evaluate("window.confirm = () => true")
    page.click("✕", "#list div.current")
    page.until("!document.querySelector('article')")
    assert page.browser.evaluate(f"{STORED}.length") == 1


def test_another_conversation_while_one_is_answered(page, engine):
    hold = threading.Event()
    engine.script = ("半", hold, "全")
    page.ask("慢")
    page.until(f"{ANSWER} === '半'")
    slow = page.browser.evaluate("location.hash")
    page.click("＋ 新对话", "aside")
    engine.script = ("快",)
    assert page.answer_to("另一个") == "快"
    hold.set()
    page.until(f"{STORED}.some(one => one.includes('半全'))")
    assert page.browser.evaluate(ANSWER) == "快"
    page.browser.evaluate(f"location.hash = '{slow}'")
    page.until(f"{ANSWER} === '半全'")


def test_stopped_answers_are_kept_and_continued(page, engine):
    engine.script = ("从前", threading.Event())
    page.ask("讲个故事")
    page.until(f"{ANSWER} === '从前'")
    page.stop()
    page.until(IDLE)
    assert (page.browser.evaluate(ANSWER), page.browser.evaluate(NOTE)) == ("从前", "已停止。")
    engine.script = ("有座山",)
    page.click("继续")
    page.until(f"{ANSWER} === '从前有座山'")
    page.until(IDLE)
    assert engine.requests[1].answer_prefix == "从前"
    assert [message.content for message in engine.requests[1].messages] == ["讲个故事"]


def test_stop_before_the_first_word(page, engine):
    engine.script = (threading.Event(),)
    page.ask("问")
    page.until("document.querySelector('.note')?.innerText === '正在想……'")
    live.wait_for(lambda: engine.streams)
    page.stop()
    page.until(IDLE)
    live.wait_for(lambda: engine.streams[0].closed.is_set())


def test_stop_while_all_the_browsers_connections_are_taken(browser):
    engine = FakeEngine("说到", threading.Event(), capacity=8)
    with live.serve(engine) as port:
        page = Page(browser, port)
        for number in range(6):
            page.click("＋ 新对话", "aside")
            page.ask(f"第{number}个")
            page.until(f"{ANSWER} === '说到'")
        page.stop()
        page.until(f"{IDLE} && {NOTE} === '已停止。'")
        live.wait_for(engine.streams[-1].closed.is_set)
        assert page.browser.evaluate(ANSWER) == "说到"


def test_answer_again_and_edited_questions(page, engine):
    page.answer_to("一")
    engine.script = ("换一个",)
    page.click("重新回答")
    page.until(f"{ANSWER} === '换一个'")
    page.until(IDLE)
    assert [message.content for message in engine.requests[1].messages] == ["一"]
    page.click("修改问题")
    assert page.browser.evaluate("document.querySelector('#question').value") == "一"
    page.answer_to("二")
    assert [message.content for message in engine.requests[2].messages] == ["一二"]


def test_an_answer_stays_until_the_edited_question_is_sent(page, engine):
    page.answer_to("一")
    page.click("修改问题")
    assert page.browser.evaluate(ANSWER) == "你好"
    assert page.browser.evaluate("!!document.querySelector('.edited')") is True
    page.open(page.browser.evaluate("location.hash"))
    assert page.until(ANSWER) == "你好"
    page.click("修改问题")
    page.browser.evaluate("document.querySelector('#question').select()")
    page.browser.evaluate("document.execCommand('delete')")
    assert page.browser.evaluate("!!document.querySelector('.edited')") is False
    page.answer_to("另一个问题")  # what was emptied is edited no more
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 2
    page.click("修改问题")
    page.answer_to("？")
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 2
    assert [message.content for message in engine.requests[2].messages] == ["一", "你好", "另一个问题？"]


def test_settings_and_the_answers_beginning(page, engine):
    for name, value in {"answer_prefix": "好的，", "temperature": "0.3", "top_p": "7", "max_tokens": "20"}.items():
        page.browser.evaluate(
            f"(input => {{ input.value = '{value}'; input.dispatchEvent(new Event('change')) }})"
            f"(document.querySelector('[name={name}]'))"
        )
    assert page.answer_to("问") == "好的，你好"
    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens, params.top_p) == (0.3, 20, 0.7)  # 7 is not allowed
    page.open()
    page.answer_to("再问")
    assert (engine.requests[1].answer_prefix, engine.requests[1].params.temperature) == ("", 0.3)


def test_a_setting_out_of_range_does_not_stop_questions(page, engine):
    page.browser.evaluate("document.querySelector('[name=temperature]').value = '5'")
    page.browser.evaluate("document.querySelector('[name=top_p]').value = '0.33'")
    page.type("问")
    page.click("发送")
    page.until(IDLE)
    params = engine.requests[0].params
    assert (params.temperature, params.top_p) == (1.0, 0.33)


def test_answers_may_be_as_long_as_the_server_allows(page, engine):
    page.answer_to("问")
    assert engine.requests[0].params.max_length == engine.max_length > 2048


def test_failures_are_sentences_and_lose_nothing(page, engine):
    engine.refuse = Overloaded("服务器已满。", "The server is full.", retry_after=3)
    page.answer_to("问")
    assert page.browser.evaluate(NOTE) == "服务器已满。"
    engine.refuse = None
    engine.script = ("一半", GenerationFailed("显存不够。", "Out of memory."))
    page.click("重新回答")
    page.until(f"{NOTE} === '显存不够。'")
    assert page.browser.evaluate(ANSWER) == "一半"
    page.open(page.browser.evaluate("location.hash"))
    assert (page.until(NOTE), page.browser.evaluate(ANSWER)) == ("显存不够。", "一半")


def test_server_that_is_gone(browser, engine):
    with live.serve(engine) as port:
        page = Page(browser, port)
        page.answer_to("在吗")
    page.answer_to("还在吗")
    assert page.browser.evaluate(NOTE).startswith("连不上服务器。")
    assert page.browser.evaluate(f"{STORED}[0]").count("在吗") == 2


def test_page_that_is_closed_in_the_middle(page, engine):
    engine.script = ("说到一半", threading.Event())
    page.ask("问")
    page.until(f"{ANSWER} === '说到一半'")
    page.open(page.browser.evaluate("location.hash"))
    assert page.until(NOTE).startswith("页面关掉时")
    assert page.browser.evaluate(ANSWER) == "说到一半"
    live.wait_for(lambda: engine.streams[0].closed.is_set())


HOSTILE = """<img src=x onerror="window.hit=1"><script>window.hit=1</script>
![pixel](https://example.com/pixel.png) [click](javascript:window.hit=1)

<iframe src="https://example.com"></iframe>

| a | b |
|---|---|
| **1** | `2` |

```python
print("<b>")
```
"""


def test_what_a_model_says_is_not_run(page, engine):
    engine.script = (HOSTILE,)
    shown = page.answer_to("问")
    assert "<script>window.hit=1</script>" in shown and '<img src=x onerror="window.hit=1">' in shown
    assert 'print("<b>")' in shown
    assert page.browser.evaluate("window.hit ?? 0") == 0
    tags = page.browser.evaluate("[...document.querySelectorAll('.answer *')].map(one => one.tagName)")
    assert {"TABLE", "STRONG", "PRE"} <= set(tags) and not {"IMG", "SCRIPT", "IFRAME"} & set(tags)
    links = page.browser.evaluate("[...document.querySelectorAll('.answer a')].map(one => [one.href, one.rel])")
    assert links[0] == ["https://example.com/pixel.png", "noopener noreferrer"]
    assert not any(href.startswith("javascript") for href, _ in links)
    assert not any("example.com" in url for url in page.browser.requested)


def test_copying(page, engine):
    engine.script = ("说明\n\n```\n一行\n```",)
    page.answer_to("问")
    page.browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.browser.call("Page.bringToFront")
    page.browser.evaluate("document.querySelector('.answer pre button').click()")
    page.until("document.querySelector('.answer pre button').textContent === '已复制'")
    assert page.browser.evaluate("navigator.clipboard.readText()") == "一行\n"
    page.browser.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as on a LAN
    page.browser.evaluate("document.execCommand = () => window.copied = document.activeElement.value")
    page.browser.evaluate("document.querySelector('.buttons button').click()")
    page.until("window.copied")
    assert page.browser.evaluate("window.copied") == "说明\n\n```\n一行\n```"
    page.until("document.querySelector('.buttons button').textContent === '已复制'")
    page.until("document.querySelector('.buttons button').textContent === '复制'")
    page.browser.evaluate("document.execCommand = () => false")
    page.browser.evaluate("document.querySelector('.buttons button').click()")
    assert page.browser.evaluate("document.querySelector('.buttons button').textContent") == "复制"


def test_keys(page, engine):
    page.type("ni")
    page.browser.evaluate(
        "document.querySelector('#question').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    page.press_enter(modifiers=8)  # Shift
    assert page.browser.evaluate("document.querySelector('#question').value") == "ni\n"
    assert engine.requests == []


def test_english_page(browser, engine):
    with live.serve(engine) as port:
        page = Page(browser, port, language="en-US,en")
        assert page.browser.evaluate("document.documentElement.lang") == "en"
        page.answer_to("hi")
        text = page.browser.evaluate("document.body.innerText")
    assert "Answer again" in text and not any("\u4e00" <= sign <= "\u9fff" for sign in text.replace("你好", ""))


def test_full_storage_is_said(page, engine):
    page.browser.evaluate("localStorage.setItem('filling', 'x'.repeat(5 * 2**20 - 200))")
    page.answer_to("问" * 300)
    assert "存储空间满了" in page.until("document.querySelector('#problem').innerText")

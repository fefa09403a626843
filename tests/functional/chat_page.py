"""The page / in a browser, as its user sees and works it."""

from __future__ import annotations

ANSWER = "document.querySelector('article:last-child .answer').innerText.trim()"
NOTE = "document.querySelector('article:last-child .note').innerText"
IDLE = "!document.querySelector('#send').hidden && !!document.querySelector('article')"
STORED = "Object.keys(localStorage).filter(key => key.startsWith('conversation:')).map(key => localStorage[key])"


class Page:
    """What a user does on the page."""

    def __init__(self, browser, port, language="zh-CN"):
        self.browser, self.here = browser, f"http://127.0.0.1:{port}/"
        browser.call("Network.setExtraHTTPHeaders", headers={"Accept-Language": language})
        self.open()

    def open(self, path=""):
        self.browser.complaints.clear()
        self.browser.requested.clear()
        self.browser.call("Page.navigate", url="about:blank")
        self.browser.call("Page.navigate", url=self.here + path)
        self.until("document.readyState === 'complete' && document.activeElement?.id === 'question'")

    def until(self, expression):
        return self.browser.wait_for(expression)

    def type(self, text):
        self.browser.evaluate("document.querySelector('#question').focus()")
        self.browser.call("Input.insertText", text=text)

    def press_enter(self, **keys):
        pressed = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r", **keys}
        self.browser.call("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self.browser.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def ask(self, text):
        self.type(text)
        self.press_enter()

    def answer_to(self, text):
        self.ask(text)
        self.until(IDLE)
        return self.browser.evaluate(ANSWER)

    def click(self, label, within="main"):
        one = f"[...document.querySelectorAll('{within} button')].findLast(one => one.textContent === '{label}')"
        self.browser.evaluate(f"{one}.click()")

    def stop(self):
        self.browser.evaluate("document.querySelector('#stop').click()")


def before_the_page(page, script):
    """Run ``script`` in each document of the page before its own code."""
    return page.browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]

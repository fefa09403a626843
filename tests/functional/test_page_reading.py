"""What the page / shows to different readers: old browsers, small screens, long and odd answers."""


def before_the_page(page, script):
    """Run ``script`` in each document of the page before its own code."""
    return page.browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]


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

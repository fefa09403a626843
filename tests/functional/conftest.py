"""A real browser with the page / of a real server, for the tests of the page."""

import pytest

from tests.fake_engine import FakeEngine
from tests.functional import live
from tests.functional.browser import Browser
from tests.functional.chat_page import Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def engine():
    return FakeEngine("你", "好")


@pytest.fixture
def port(engine):
    with live.serve(engine) as port:  # each on a port, and so with a storage, of its own
        yield port


@pytest.fixture
def page(browser, port):
    return Page(browser, port)

"""The files of the page /: which are served, how, and where they are from."""

import pytest

from server.api import webui
from tests.functional import live
from tools import vendor_web


@pytest.mark.parametrize("path", webui.FILES)
def test_files_of_the_page(port, path):
    status, headers, content = live.request(port, "GET", f"/web/{path}")
    kind = "text/css" if path.endswith("css") else "text/javascript"
    assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
    assert content == (webui.FOLDER / path).read_bytes()


def test_nothing_else_is_served_and_loaded(port):
    for path in ("/web/index.html", "/web/../index.html", "/web/vendor/marked/LICENSE"):
        assert live.request(port, "GET", path)[0] == 404
    headers = live.request(port, "GET", "/", headers={"Accept": "text/html"})[1]
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
    assert headers["Vary"] == "Accept, Accept-Language"


@pytest.mark.parametrize("package", vendor_web.PACKAGES, ids=lambda package: package.name)
def test_vendored_code_is_of_the_pinned_version(package):
    marks = {
        "swagger-ui-dist": 'PACKAGE_VERSION:"{}"',
        "marked": "marked v{} ",
        "dompurify": "DOMPurify {} ",
        "eventsource-parser": "",  # says no version
    }
    folder = vendor_web.TARGET / package.folder
    assert {path.name for path in folder.iterdir()} == {path.rpartition("/")[2] for path in package.files}
    code = (folder / package.files[0].rpartition("/")[2]).read_text(encoding="utf-8")
    assert marks[package.name].format(package.version) in code

"""The page for people who open the server's address in a browser: a chat, and where programs find the API."""

from __future__ import annotations

from pathlib import Path

from flask import Flask, Response, render_template, request, send_file

from server.api.dialect import Call

FOLDER = Path(__file__).resolve().parent.parent / "webui"
VENDOR = "vendor/eventsource-parser/"
FILES = (
    *("style.css", "app.js", "client.js", "markdown.js", "menu.js", "settings.js", "store.js", "text.js", "view.js"),
    *("vendor/marked/marked.esm.js", "vendor/dompurify/purify.es.mjs"),
    *(VENDOR + "stream.js", VENDOR + "parse.js", VENDOR + "errors.js"),
)
# the browser itself sees to it that nothing is asked of other machines, whatever a model's answer contains
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def register(app: Flask) -> None:
    """Give ``app`` the addresses of the page's files."""
    for path in FILES:
        # said here: Windows' registry may say something else of .js and .css
        kind = "text/css" if path.endswith(".css") else "text/javascript"
        app.add_url_rule(f"/web/{path}", path, send, defaults={"path": path, "content_type": kind})


def send(path: str, content_type: str) -> Response:
    """A file of a page, which browsers keep but ask about each time."""
    response = send_file(FOLDER / path, mimetype=content_type)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def is_wanted() -> bool:
    """Whether the current request prefers HTML, as browsers say; ``*/*`` (curl, axios) does not."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


def page(call: Call) -> Response:
    here = request.host_url.rstrip("/")
    addresses = call.settings.addresses or (here,)
    zh = call.language == "zh"
    return Response(
        render_template("index.html", addresses=addresses, here=here, model=call.engine.model_name, zh=zh),
        content_type="text/html; charset=utf-8",
        headers={
            "Cache-Control": "no-cache",
            "Content-Security-Policy": POLICY,
            "Vary": "Accept, Accept-Language",
        },
    )

"""The page for people who open the server's address in a browser."""

from __future__ import annotations

from pathlib import Path

from flask import Response, render_template, request

from server.api.dialect import Call

FOLDER = Path(__file__).resolve().parent.parent / "webui"


def is_wanted() -> bool:
    """Whether the current request prefers HTML, as browsers say; ``*/*`` (curl, axios) does not."""
    return request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html"


def page(call: Call) -> Response:
    here = request.host_url.rstrip("/")
    addresses = call.settings.addresses or (here,)
    return Response(
        render_template("index.html", addresses=addresses, here=here, model=call.engine.model_name),
        content_type="text/html; charset=utf-8",
        headers={"Cache-Control": "no-cache", "Vary": "Accept"},
    )

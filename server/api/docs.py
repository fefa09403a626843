"""/openapi.json, and the page /docs that shows it and tries it out: all of it served from here, for use offline."""

from __future__ import annotations

from functools import cache

from flask import Flask, Response

from server.api import openapi, webui
from server.api.dialect import ApiSettings, to_json

PAGE = "docs.html"
VENDOR = "vendor/swagger-ui/"
# by name, where the file is and what it is: Windows' registry may say something else of .js and .css
FILES = {
    "docs.js": ("docs.js", "text/javascript"),
    "swagger-ui-bundle.js": (VENDOR + "swagger-ui-bundle.js", "text/javascript"),
    "swagger-ui-bundle.js.LICENSE.txt": (VENDOR + "swagger-ui-bundle.js.LICENSE.txt", "text/plain"),
    "swagger-ui.css": (VENDOR + "swagger-ui.css", "text/css"),
}
POLICY = f"{webui.POLICY}; style-src 'self' 'unsafe-inline'"  # the page's code writes styles into its tags


def register(app: Flask, settings: ApiSettings) -> None:
    """Give ``app`` these addresses beside those of the dialects."""

    @cache
    def document() -> bytes:
        return to_json(openapi.document(settings.version))

    @app.get("/openapi.json")
    def openapi_json() -> Response:
        response = Response(document(), content_type="application/json; charset=utf-8")
        response.headers["Cache-Control"] = "no-cache"
        return response

    @app.get("/docs", strict_slashes=False)
    def docs_page() -> Response:
        response = webui.send(PAGE, "text/html")
        response.headers["Content-Security-Policy"] = POLICY
        return response

    for name, (path, content_type) in FILES.items():
        app.add_url_rule(f"/docs/{name}", name, webui.send, defaults={"path": path, "content_type": content_type})

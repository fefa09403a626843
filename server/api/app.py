"""The Flask application: routes, languages, CORS, and every failure as one JSON sentence."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flask import Flask, Response, g, request
from flask_cors import CORS
from werkzeug import exceptions
from werkzeug.datastructures import LanguageAccept
from werkzeug.http import parse_accept_header

from server.api import docs, openapi, routing, webui
from server.api.dialect import ApiSettings, json_response
from server.core import Engine
from server.errors import BadRequest, MethodNotAllowed, NotFound, Overloaded, PayloadTooLarge, ServerError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment  # new in Python 3.11

log = logging.getLogger(__name__)


def create_app(engine: Engine, settings: ApiSettings) -> Flask:
    """The WSGI application for one engine."""
    app = Flask("chatglm-portable", template_folder=str(webui.FOLDER), static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.wsgi_app = _merge_slashes(app.wsgi_app)
    CORS(
        app,
        origins=settings.cors_origins,
        expose_headers=["X-Request-Id", "Retry-After"],
        max_age=86400,
    )
    routing.register(app, engine, settings)
    docs.register(app, settings)
    webui.register(app)

    @app.before_request
    def choose_language() -> None:
        g.language = language_of(request.headers.get("Accept-Language", ""), settings.language)

    @app.errorhandler(Exception)
    def fail(error: Exception) -> Response:
        known = _as_server_error(error, settings)
        if isinstance(error, ServerError) and error.status >= 500:
            what = (request.method, request.path[:80], request.remote_addr)
            log.warning("%s %s from %s: %d %s", *what, error.status, error)
        response = _error_response(known)
        if isinstance(error, exceptions.MethodNotAllowed):
            response.allow.update(error.valid_methods or ())
        return response

    return app


def _merge_slashes(wsgi_app: WSGIApplication) -> WSGIApplication:
    """For clients that put a path behind a base URL with a slash at its end; Flask's redirect would lose a POST."""

    def merged(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = re.sub("/+", "/", environ["PATH_INFO"])
        return wsgi_app(environ, start_response)

    return merged


def language_of(accept_language: str, default: str) -> str:
    """Chinese ("zh") or English ("en") for an Accept-Language header; ``default`` if it is absent or ``*``."""
    best = parse_accept_header(accept_language, LanguageAccept).best
    if best in (None, "*"):
        return default
    return "zh" if best.lower().startswith("zh") else "en"


def too_large(limit: int) -> PayloadTooLarge:
    """The sentence for a body of more than ``limit`` bytes, also for waitress, which sees it first."""
    size = f"{limit / 2**20:g} MiB"
    return PayloadTooLarge(f"请求体超过上限 {size}。", f"The body is larger than the limit of {size}.")


def internal_error() -> ServerError:
    """The sentence for what should not have happened; the traceback belongs into the log."""
    return ServerError("服务器内部错误，详见服务器日志。", "Internal error; see the server's log.")


def _as_server_error(error: Exception, settings: ApiSettings) -> ServerError:
    path = request.path[:80]
    if isinstance(error, ServerError):
        return error
    if isinstance(error, exceptions.NotFound):
        paths = ", ".join([*map(openapi.template, routing.by_path()), "/docs"])
        return NotFound(f"没有 {path}。可用的路径：{paths}。", f"There is no {path}. There are: {paths}.")
    if isinstance(error, exceptions.MethodNotAllowed):
        methods = ", ".join(sorted(error.valid_methods or ()))
        return MethodNotAllowed(
            f"{path} 不支持 {request.method}。可用的方法：{methods}。",
            f"{path} does not take {request.method}. It takes: {methods}.",
        )
    if isinstance(error, exceptions.RequestEntityTooLarge):
        return too_large(settings.max_body_bytes)
    if isinstance(error, exceptions.HTTPException) and error.code and error.code < 500:
        return BadRequest("请求有误。", f"The request is malformed: {error.name}.")
    log.error("%s %s failed", request.method, path, exc_info=error)
    return internal_error()


def _error_response(error: ServerError) -> Response:
    response = json_response(routing.error_dialect().error_body(error, g.language), error.status)
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(error.retry_after)
    return response

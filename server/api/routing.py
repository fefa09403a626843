"""Which dialect answers a request: one ordered table, path and method first, then each dialect's claim."""

from __future__ import annotations

from functools import partial
from typing import Any

from flask import Flask, Response, g, request

from server.api.dialect import ApiSettings, Call, Dialect, Route
from server.api.dialects import glm_api, my_chatglm2, official, openai, web_stream
from server.api.fields import read_fields, validate
from server.core import Engine

# On a shared path the first dialect that claims the fields answers; if none does, the path's first one says what lacks.
DIALECTS: tuple[Dialect, ...] = (
    my_chatglm2.DIALECT,
    glm_api.DIALECT,
    web_stream.DIALECT,
    official.DIALECT,
    openai.DIALECT,
)

Candidate = tuple[Dialect, Route]


def by_path() -> dict[str, list[Candidate]]:
    """All routes of all dialects, in the table's order."""
    table: dict[str, list[Candidate]] = {}
    for dialect in DIALECTS:
        for route in dialect.routes:
            table.setdefault(route.path, []).append((dialect, route))
    return table


def register(app: Flask, engine: Engine, settings: ApiSettings) -> None:
    """Give ``app`` a rule for each path; Flask itself answers OPTIONS, unknown paths and wrong methods."""
    for path, candidates in by_path().items():
        methods = {method for _, route in candidates for method in route.methods}
        app.add_url_rule(
            path, path, partial(_dispatch, candidates, engine, settings), methods=methods, strict_slashes=False
        )


def choose(candidates: list[Candidate], method: str, fields: dict[str, Any]) -> Candidate:
    """The first route for ``method`` that claims the fields, else the first one for it."""
    open_to_method = [candidate for candidate in candidates if method in candidate[1].methods]
    return next((candidate for candidate in open_to_method if candidate[1].claims(fields)), open_to_method[0])


def _dispatch(candidates: list[Candidate], engine: Engine, settings: ApiSettings, **path_fields: str) -> Response:
    if request.method == "HEAD" and not any("HEAD" in route.methods for _, route in candidates):
        return Response()  # Flask allows HEAD wherever GET is: nothing is generated for it
    g.dialect, _ = choose(candidates, request.method, {})  # who says so if the fields cannot be read
    fields = {**read_fields(request), **path_fields}
    g.dialect, route = choose(candidates, request.method, fields)
    call = Call(
        engine=engine,
        settings=settings,
        client=request.remote_addr or "",
        language=g.language,
        gone=request.environ.get("waitress.client_disconnected", lambda: False),
        behind=request.environ.get("chatglm.client_behind", lambda: False),
    )
    return route.handle(call, validate(route.fields, fields))


def error_dialect() -> Dialect:
    """Whose shape the current request's error takes."""
    return g.get("dialect") or dialect_for_path(request.path)


def dialect_for_path(path: str) -> Dialect:
    """Whose clients would call this path, which may have no route: the first dialect with a route in that folder."""
    folder = path.split("/")[1:2]
    near = (dialect for dialect in DIALECTS for route in dialect.routes if route.path.split("/")[1:2] == folder)
    return next(near, DIALECTS[0])

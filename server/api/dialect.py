"""What a dialect is made of: routes with their fields, claims and handlers, and the shape of its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flask import Response
from pydantic import BaseModel

from server.api.chatlog import ChatLog
from server.core import Engine
from server.errors import ServerError


@dataclass(frozen=True)
class ApiSettings:
    """What the HTTP side needs to know; ``addresses`` are the URLs that the page shows, the best one first."""

    chat_log: ChatLog | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    cors_origins: str | tuple[str, ...] = "*"
    language: str = "zh"  # of sentences for clients that send no Accept-Language: "zh" or "en"
    addresses: tuple[str, ...] = ()
    glm_api_stream: str = "cumulative"  # what an event of GLM-API's /chat-stream carries: "cumulative" or "delta"
    version: str = ""  # of the program, for /openapi.json


@dataclass(frozen=True)
class Call:
    """One HTTP request as a handler sees it.

    ``gone()`` tells whether its client has closed the connection, ``behind()`` whether the client has yet to take some
    of what was sent.
    """

    engine: Engine
    settings: ApiSettings
    client: str
    language: str
    gone: Callable[[], bool]
    behind: Callable[[], bool] = lambda: False


def always(fields: dict[str, Any]) -> bool:
    """The claim of a route that has its path to itself, or that is the last in line for it."""
    return True


@dataclass(frozen=True)
class Route:
    """A path of a dialect. Of the routes that share it, the first one whose ``claims(fields)`` holds answers.

    What /openapi.json says of it beside ``fields`` and the handler's docstring: ``example``, fields to try it with;
    ``answers``, for each content type that it sends an example, a text or a JSON object whose keys are in every such
    answer, or a tuple of them for answers of several shapes; ``failures`` that it may raise beside BadRequest and
    PayloadTooLarge.
    """

    path: str
    methods: tuple[str, ...]
    fields: type[BaseModel]
    handle: Callable[[Call, Any], Response]
    claims: Callable[[dict[str, Any]], bool] = always
    example: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[type[ServerError], ...] = ()


@dataclass(frozen=True)
class Dialect:
    """``error_body(error, language)`` is the JSON object that this dialect's clients expect for a failure.

    ``about`` introduces it in /openapi.json: the module's docstring.
    """

    name: str
    routes: tuple[Route, ...]
    error_body: Callable[[ServerError, str], dict[str, Any]]
    about: str = ""


def to_json(value: Any) -> bytes:
    """UTF-8 JSON with json.dumps' own separators, never ASCII-escaped; half a surrogate pair becomes "?"."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200) -> Response:
    """A response of a value, or of the bytes of one that is JSON already."""
    body = value if isinstance(value, bytes) else to_json(value)
    # the charset is for Windows PowerShell 5.1, which else reads JSON as Latin-1
    return Response(body, status, content_type="application/json; charset=utf-8")

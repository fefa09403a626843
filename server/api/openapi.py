"""The OpenAPI document, made of what validates the requests: the dialects' routes, their fields and their errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from server.api import schemas
from server.api.dialect import Dialect, Route
from server.api.routing import DIALECTS, Candidate, by_path
from server.api.schemas import Schema
from server.errors import BadRequest, PayloadTooLarge, ServerError

INTRODUCTION = """\
一个端口同时兼容几代 ChatGLM 服务器和 OpenAI 的协议：旧客户端只改地址就能用。

- 请求体一律按 JSON 读（UTF-8 或 GBK），不看 `Content-Type`；数字可以写成字符串；不认识的字段忽略；`null` 等于没写。
- 网址参数里的真假值除了 `true`、`false`，也可以写 `1`、`0`、`yes`、`no`、`on`、`off`。
- 出错时的说明是中文还是英文，由 `Accept-Language` 决定。

One port speaks the protocols of several generations of ChatGLM servers and OpenAI's: old clients change the address
and nothing else.

- Bodies are read as JSON (UTF-8 or GBK) whatever `Content-Type` says; numbers may be numeric strings; unknown fields
  are ignored; `null` stands for a field that is not there.
- In query parameters `1`, `0`, `yes`, `no`, `on` and `off` stand for `true` and `false`, too.
- `Accept-Language` decides whether an error is explained in Chinese or in English.
"""
SENTENCE = ("说明哪里不对、该怎么办。", "It says what was wrong and what is allowed.")
JSON = "application/json"
PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")  # in Flask's paths

References = dict[type[BaseModel], Schema]


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 for all routes of all dialects; ``version`` is the program's."""
    routes = [route for dialect in DIALECTS for route in dialect.routes]
    references, definitions = schemas.of_models(route.fields for route in routes if _has_body(route))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ChatGLM 一键包 · chatglm-portable",
            "version": version,
            "description": INTRODUCTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": dialect.name, "description": inspect.cleandoc(dialect.about)} for dialect in DIALECTS],
        "paths": {
            template(path): dict(_operations(path, candidates, references))
            for path, candidates in by_path().items()
        },
        "components": {"schemas": definitions | {_error_name(d): _error_schema(d) for d in DIALECTS}},
    }


def template(path: str) -> str:
    """Flask's ``/v1/models/<path:model>`` as ``/v1/models/{model}``."""
    return PARAMETER.sub(r"{\1}", path)


def _has_body(route: Route) -> bool:
    return bool(route.fields.model_fields) and "POST" in route.methods


def _operations(path: str, candidates: list[Candidate], references: References) -> Iterator[tuple[str, Any]]:
    for method in dict.fromkeys(method for _, route in candidates for method in route.methods):
        serving = [(dialect, route) for dialect, route in candidates if method in route.methods]
        yield method.lower(), _operation(path, method, serving, references)


def _operation(path: str, method: str, serving: list[Candidate], references: References) -> dict[str, Any]:
    texts = [inspect.getdoc(route.handle) or "" for _, route in serving]
    operation = {
        "operationId": "_".join([method.lower(), *(re.findall(r"\w+", template(path)) or ["root"])]),
        "tags": [dialect.name for dialect, _ in serving],
        "summary": " / ".join(_first_line(text) for text in texts),
        "description": texts[0].partition("\n")[2].strip() if len(serving) == 1 else _who_answers(serving, texts),
        "parameters": list(_parameters(path, method, [route for _, route in serving])),
        "responses": dict(_responses(method, serving)),
    }
    bodies = [(dialect, route) for dialect, route in serving if _has_body(route)]
    if method == "POST" and bodies:
        operation["requestBody"] = _request_body(bodies, references)
    return operation


def _first_line(text: str) -> str:
    return text.partition("\n")[0].replace("`", "").rstrip(".")


def _who_answers(serving: list[Candidate], texts: list[str]) -> str:
    """For a path that dialects share: which fields decide, in the order in which they are asked."""
    lines = ["The fields decide whose a request is; the first of these says what is missing if nobody claims it.", ""]
    for (dialect, route), text in zip(serving, texts, strict=True):
        lines.append(f"- **{dialect.name}** if it {inspect.getdoc(route.claims)}: {' '.join(text.split())}")
    return "\n".join(lines)


def _parameters(path: str, method: str, routes: list[Route]) -> Iterator[dict[str, Any]]:
    """What stands in the path and, for GET, in the query. No two dialects share a path there."""
    if method == "POST":
        return
    in_path = PARAMETER.findall(path)
    for route in routes:
        for name, schema in schemas.of_parameters(route.fields).items():
            required = route.fields.model_fields[name].is_required()
            if required and schema["type"] == "string":
                schema["minLength"] = 1  # an empty parameter counts as none
            described = {"description": schema.pop("description")} if "description" in schema else {}
            value = {"schema": schema, **({"example": route.example[name]} if name in route.example else {})}
            as_json = schema["type"] in ("array", "object")
            yield {
                "name": name,
                "in": "path" if name in in_path else "query",
                "required": required,
                **described,
                **({"content": {JSON: value}} if as_json else value),
            }


def _request_body(serving: list[Candidate], references: References) -> dict[str, Any]:
    examples = [(dialect.name, dict(route.example)) for dialect, route in serving]
    return {
        "required": all(_must_have_fields(route) for _, route in serving),
        "content": {JSON: {"schema": _any_of(references[route.fields] for _, route in serving), **_shown(examples)}},
    }


def _must_have_fields(route: Route) -> bool:
    return any(field.is_required() for field in route.fields.model_fields.values())


def _responses(method: str, serving: list[Candidate]) -> Iterator[tuple[str, Any]]:
    answers: dict[str, list[tuple[str, Any]]] = {}
    failures: dict[int, list[tuple[Dialect, type[ServerError]]]] = {}
    for dialect, route in serving:
        for content_type, answer in route.answers.items():
            examples = answer if isinstance(answer, tuple) else (answer,)
            answers.setdefault(content_type, []).extend((dialect.name, example) for example in examples)
        for failure in (BadRequest, PayloadTooLarge, *route.failures):
            failures.setdefault(failure.status, []).append((dialect, failure))
    contents = {200: _contents(answers)} | {status: _failure(ways) for status, ways in sorted(failures.items())}
    for status, content in contents.items():
        with_content = {"content": content} if method != "HEAD" else {}
        yield str(status), {"description": HTTPStatus(status).phrase, **with_content}


def _failure(ways: list[tuple[Dialect, type[ServerError]]]) -> dict[str, Any]:
    dialects = {dialect.name: dialect.error_body(failure(*SENTENCE), "en") for dialect, failure in ways}
    schema = _any_of({"$ref": f"#/components/schemas/{_error_name(dialect)}"} for dialect, _ in ways)
    return {JSON: {"schema": schema, **_shown(list(dialects.items()))}}


def _contents(answers: dict[str, list[tuple[str, Any]]]) -> dict[str, Any]:
    return {
        content_type: {"schema": _any_of(schemas.of_example(example) for _, example in examples), **_shown(examples)}
        for content_type, examples in answers.items()
    }


def _any_of(alternatives: Iterable[Schema]) -> Schema:
    different: list[Schema] = []
    for schema in alternatives:
        if schema not in different:
            different.append(schema)
    return different[0] if len(different) == 1 else {"anyOf": different}


def _shown(examples: list[tuple[str, Any]]) -> dict[str, Any]:
    """One example, or several by name."""
    if len(examples) == 1:
        return {"example": examples[0][1]}
    names = [name for name, _ in examples]
    numbered = [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names, 1)]
    return {"examples": {name: {"value": value} for name, (_, value) in zip(numbered, examples, strict=True)}}


def _error_name(dialect: Dialect) -> str:
    return re.sub(r"[^\w.-]+", "_", dialect.name) + "_Error"


def _error_schema(dialect: Dialect) -> Schema:
    shape = schemas.of_example(dialect.error_body(BadRequest(*SENTENCE), "en"))
    return {**shape, "description": f"A failure, as {dialect.name} says it."}

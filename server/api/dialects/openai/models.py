"""The models that there are."""

from __future__ import annotations

from typing import Any

from flask import Response
from pydantic import Field

from server.api.dialect import Call, json_response
from server.api.dialects.openai.shapes import now
from server.api.fields import Fields, NoFields, Text
from server.errors import NotFound

ALIAS = "gpt-3.5-turbo"  # what old clients ask for; some list no others


class ModelFields(Fields):
    model: Text = Field(description="a model's id")


class ModelNotFound(NotFound):
    code = "model_not_found"


def list_models(call: Call, fields: NoFields) -> Response:
    """The language model, the name by which old clients call it, and the embedding model."""
    return json_response({"object": "list", "data": [_model_body(name) for name in _names(call)]})


def retrieve_model(call: Call, fields: ModelFields) -> Response:
    """One of the listed models. Requests for answers may name others: the language model answers them all."""
    if fields.model not in _names(call):
        names, asked = ", ".join(_names(call)), fields.model[:80]
        zh, en = f"没有模型 {asked}，有：{names}。", f"There is no model {asked}; there are: {names}."
        raise ModelNotFound(zh, en, param="model")
    return json_response(_model_body(fields.model))


def _names(call: Call) -> list[str]:
    return [name for name in (call.engine.model_name, ALIAS, call.engine.embedding_model) if name]


def _model_body(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": now(), "owned_by": "chatglm-portable"}

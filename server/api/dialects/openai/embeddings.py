"""Vectors of texts."""

from __future__ import annotations

import base64
import struct
from array import array
from typing import Annotated, Any, Literal

from flask import Response
from pydantic import BeforeValidator, Field

from server.api.dialect import Call, json_response
from server.api.dialects.openai.fields import sentence
from server.api.fields import Fields, Text, WholeNumber, texts
from server.errors import BadRequest


def _no_ids(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], (int, list)):
        raise sentence(
            "这里只接受文本，不接受 token id（LangChain 请设 check_embedding_ctx_length=False）。",
            "only texts are accepted here, no token ids (in LangChain, set check_embedding_ctx_length=False).",
        )
    return value


class EmbeddingFields(Fields):
    input: Annotated[texts(least=1, most=2048), BeforeValidator(_no_ids)] = Field(
        description="a text or texts; token ids are refused"
    )
    model: Text = Field("", description="any name is accepted; the answer names the model that really ran")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of little-endian float32")
    dimensions: WholeNumber | None = Field(None, ge=1, description="nothing but the model's own width is possible")


def embeddings(call: Call, fields: EmbeddingFields) -> Response:
    """The sentence model's vectors of the texts, in their order. Long texts are cut at 256 tokens."""
    found = call.engine.embed(fields.input, call.gone)
    width = len(found.vectors[0])
    if fields.dimensions not in (None, width):
        raise BadRequest(
            f"dimensions 只能是 {width}，这是向量模型的宽度。",
            f"dimensions can only be {width}, the width of the embedding model.",
            param="dimensions",
        )
    shape = _base64 if fields.encoding_format == "base64" else list
    return json_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": shape(vector)}
                for index, vector in enumerate(found.vectors)
            ],
            "model": call.engine.embedding_model,
            "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
        }
    )


def _base64(vector: array[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

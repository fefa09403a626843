"""OpenAI's protocol, as its current official clients speak it: models, chat, text completions, embeddings.

An API key is accepted and ignored, and so is the name of the model. A stream that fails ends with an event
`{"error": {...}}` and without `[DONE]`; lines that begin with a colon only keep the connection alive.
"""

from __future__ import annotations

from server.api.dialect import Dialect, Route
from server.api.dialects.openai import examples
from server.api.dialects.openai.chat import ChatFields, chat_completions
from server.api.dialects.openai.completions import CompletionFields, completions
from server.api.dialects.openai.embeddings import EmbeddingFields, embeddings
from server.api.dialects.openai.models import ModelFields, ModelNotFound, list_models, retrieve_model
from server.api.dialects.openai.shapes import error_body
from server.api.fields import NoFields
from server.errors import GenerationFailed, Overloaded, Unavailable

FAILURES = (Overloaded, GenerationFailed)

DIALECT = Dialect(
    name="OpenAI",
    routes=(
        Route("/v1/models", ("GET",), NoFields, list_models, answers=examples.MODELS_ANSWERS),
        Route(
            "/v1/models/<path:model>",
            ("GET",),
            ModelFields,
            retrieve_model,
            example={"model": "gpt-3.5-turbo"},
            answers=examples.MODEL_ANSWERS,
            failures=(ModelNotFound,),
        ),
        Route(
            "/v1/chat/completions",
            ("POST",),
            ChatFields,
            chat_completions,
            example=examples.CHAT,
            answers=examples.CHAT_ANSWERS,
            failures=FAILURES,
        ),
        Route(
            "/v1/completions",
            ("POST",),
            CompletionFields,
            completions,
            example=examples.COMPLETION,
            answers=examples.COMPLETION_ANSWERS,
            failures=FAILURES,
        ),
        Route(
            "/v1/embeddings",
            ("POST",),
            EmbeddingFields,
            embeddings,
            example=examples.EMBEDDING,
            answers=examples.EMBEDDING_ANSWERS,
            failures=(*FAILURES, Unavailable),
        ),
    ),
    error_body=error_body,
    about=__doc__,
)

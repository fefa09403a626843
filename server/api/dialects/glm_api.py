"""GLM-API's HTTP protocol, that of its early FastAPI version: chat, token ids, sentence vectors.

Events of /chat-stream are cumulative, as that version sent them; its later ones send in each what is new
(``glm_api_stream=delta``). The original had no shape for failures: here they are an object whose ``object`` is "error",
with a "message". An answer that fails on the way ends with such an object, which has the usual keys too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Response
from pydantic import Field

from server.api.dialect import Call, Dialect, Route, json_response
from server.api.fields import Fields, History, Number, Text, WholeNumber, conversation, texts
from server.api.streaming import ask, sse, stream_response, with_request_id
from server.core import GenerationRequest, Overflow, SamplingParams, Tokenization
from server.errors import GenerationFailed, Overloaded, ServerError, Unavailable


class ChatFields(Fields):
    prompt: Text = Field(description="the question")
    history: History = Field([], description="earlier rounds, [[question, answer], ...]; the oldest are dropped first")
    max_length: WholeNumber = Field(4096, ge=1, description="tokens of prompt and answer; capped by the server's limit")
    top_p: Number = Field(0.7, ge=0, le=1, description="nucleus sampling; 0 leaves only the best token, 1 is off")
    temperature: Number = Field(0.95, ge=0, le=2, description="0 always takes the best token")


class TokenizeFields(Fields):
    prompt: Text = Field(description="the text to cut")
    max_length: WholeNumber = Field(4096, ge=1, description="most ids to return, special tokens included")


class EmbeddingFields(Fields):
    prompt: texts(least=1, most=2048) = Field(description="the texts; one string is taken as an array of one")


def chat(call: Call, fields: ChatFields) -> Response:
    """The whole answer to the prompt, and how many tokens the prompt and the answer have."""
    answer = ask(call, _request(call, fields))
    text = answer.read_all()
    if answer.error:
        raise answer.error
    return with_request_id(json_response(_completion(call, _count(call, fields.prompt), text)), answer)


def chat_stream(call: Call, fields: ChatFields) -> Response:
    """The answer while it is made, as unnamed server-sent events that are each what /chat returns.

    Each event's content is the whole answer so far, or only what is new if the server was started so.
    """
    answer = ask(call, _request(call, fields))

    def events() -> Iterator[bytes]:
        prompt_tokens = _count(call, fields.prompt)
        for delta in answer.deltas():
            event = _completion(call, prompt_tokens, answer.text)
            if call.settings.glm_api_stream == "delta":
                event["content"] = delta
            if answer.error:
                event |= error_body(answer.error, call.language)
            yield sse(event)

    return stream_response(events(), answer)


def _request(call: Call, fields: ChatFields) -> GenerationRequest:
    return GenerationRequest(
        messages=conversation(fields.history, fields.prompt),
        overflow=Overflow.DROP_OLDEST,
        params=SamplingParams(
            temperature=fields.temperature,
            top_p=fields.top_p,
            max_length=min(fields.max_length, call.engine.max_length),
        ),
        client=call.client,
    )


def _completion(call: Call, prompt_tokens: int, text: str) -> dict[str, Any]:
    completion_tokens = _count(call, text)
    return {
        "content": text,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "model": call.engine.model_name,
        "object": "chat.completion",
    }


def _count(call: Call, text: str) -> int:
    return len(call.engine.tokenize(text).ids)


def tokenize(call: Call, fields: TokenizeFields) -> Response:
    """The ids of a text with the model's special tokens, cut at max_length, and all its pieces without them."""
    tokens = call.engine.tokenize(fields.prompt)
    return json_response({"tokenIds": _truncated(tokens, fields.max_length), "tokens": tokens.pieces})


def _truncated(tokens: Tokenization, max_length: int) -> tuple[int, ...]:
    """``prompt_ids`` less the last ids of the text, as transformers truncates: special tokens in front or behind stay.

    At most ``max_length`` in any case.
    """
    ids, with_special = tokens.ids, tokens.prompt_ids
    in_front = 0 if with_special[: len(ids)] == ids else len(with_special) - len(ids)
    kept = max(0, len(ids) - max(0, len(with_special) - max_length))
    return (with_special[: in_front + kept] + with_special[in_front + len(ids) :])[:max_length]


def embedding(call: Call, fields: EmbeddingFields) -> Response:
    """One vector per text, in their order: the sentence model's mean of its last hidden states, not normalised."""
    vectors = call.engine.embed(fields.prompt, call.gone).vectors
    return json_response(
        {"data": [list(vector) for vector in vectors], "model": call.engine.embedding_model, "object": "embedding"}
    )


def error_body(error: ServerError, language: str) -> dict[str, Any]:
    return {"message": error.text(language), "object": "error"}


def has_prompt(fields: dict[str, Any]) -> bool:
    """has `prompt`"""
    return "prompt" in fields


_QUESTION = {"prompt": "你好", "history": [["1+1=?", "2"]], "max_length": 4096, "top_p": 0.7, "temperature": 0.95}
_COMPLETION = {
    "content": "你好！",
    "prompt_tokens": 1,
    "completion_tokens": 2,
    "total_tokens": 3,
    "model": "chatglm2-6b",
    "object": "chat.completion",
}

DIALECT = Dialect(
    name="GLM-API",
    routes=(
        Route(
            "/chat",
            ("POST",),
            ChatFields,
            chat,
            has_prompt,
            example=_QUESTION,
            answers={"application/json": _COMPLETION},
            failures=(Overloaded, GenerationFailed),
        ),
        Route(
            "/chat-stream",
            ("POST",),
            ChatFields,
            chat_stream,
            example=_QUESTION,
            answers={"text/event-stream": sse(_COMPLETION).decode()},
            failures=(Overloaded,),
        ),
        Route(
            "/tokenize",
            ("POST",),
            TokenizeFields,
            tokenize,
            has_prompt,
            example={"prompt": "你好", "max_length": 4096},
            answers={"application/json": {"tokenIds": [64790, 64792, 36474, 54591], "tokens": ["▁你", "好"]}},
        ),
        Route(
            "/embedding",
            ("POST",),
            EmbeddingFields,
            embedding,
            example={"prompt": ["你好", "hello"]},
            answers={
                "application/json": {
                    "data": [[0.25, -0.5], [0.125, 1.5]],
                    "model": "text2vec-large-chinese",
                    "object": "embedding",
                }
            },
            failures=(Overloaded, Unavailable, GenerationFailed),
        ),
    ),
    error_body=error_body,
    about=__doc__,
)

"""JSON of OpenAI's objects."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Any

from server.core import FinishReason, RequestOutput, TokenLogprob, ToolCall, Usage
from server.errors import ServerError

LOWEST_LOGPROB = -9999.0  # OpenAI's own for "very unlikely"; JSON has no infinity


def now() -> int:
    return int(time.time())


def error_body(error: ServerError, language: str) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.text(language), "type": kind, "param": error.param, "code": error.code}}


def usage_body(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """The tokens of all answers, ``n`` in a row for each prompt, which is counted once."""
    prompt = sum(usage.prompt_tokens for usage in usages[::n])
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages[::n])},
    }


def finish_reason(output: RequestOutput, called: str = "") -> str | None:
    """``called`` is the reason of an answer that asked for tools; an interrupted answer just stops."""
    if output.finish_reason is None:
        return None
    return "length" if output.finish_reason is FinishReason.LENGTH else called or "stop"


def function_body(call: ToolCall) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


class TextLogprobs:
    """The older shape, in lists; ``offset`` is where in the choice's text the first token begins."""

    def __init__(self, offset: int = 0):
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def body(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [_token_text(token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else _likeliest(token) for token in tokens],
            "text_offset": [self._advance(token) for token in tokens],
        }

    def _advance(self, token: TokenLogprob) -> int:
        begin = max(0, self._offset)
        self._offset += len(self._decoder.decode(token.data))
        return begin


def _likeliest(token: TokenLogprob) -> dict[str, float | None]:
    """The likeliest tokens and the one that came; of two with the same text, the likelier one."""
    found: dict[str, float | None] = {}
    for other in (*token.top, token):
        found.setdefault(_token_text(other), _finite(other.logprob))
    return found


def _token_text(token: TokenLogprob) -> str:
    try:
        return token.data.decode()
    except UnicodeDecodeError:  # OpenAI's own notation for parts of characters
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)

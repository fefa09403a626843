"""What /openapi.json shows of the protocol: requests to try and what they are answered with."""

from __future__ import annotations

import json
from typing import Any

MADE = {"created": 1700000000, "model": "chatglm2-6b"}
USAGE = {
    "prompt_tokens": 8,
    "completion_tokens": 3,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 0},
}
CALL = {"id": "call_req-1f_0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}


def _chat(finish_reason: str, **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "refusal": None, **message}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "chatcmpl-req-1f", "object": "chat.completion", **MADE, "choices": [choice], "usage": USAGE}


def _chat_stream(finish_reason: str, *deltas: dict[str, Any]) -> str:
    """The events of an answer; the first delta is the role's, the last one empty."""
    reasons = [None] * (len(deltas) + 1) + [finish_reason]
    choices = [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        for delta, reason in zip(({"role": "assistant", "content": ""}, *deltas, {}), reasons, strict=True)
    ]
    return _stream("chatcmpl-req-1f", "chat.completion.chunk", choices)


def _stream(name: str, kind: str, choices: list[dict[str, Any]]) -> str:
    chunks = [{"id": name, "object": kind, **MADE, "choices": [choice]} for choice in choices]
    return "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


CHAT = {"messages": [{"role": "user", "content": "你好"}]}
CHAT_ANSWERS = {
    "application/json": (
        _chat("stop", content="你好！"),
        _chat("tool_calls", content=None, tool_calls=[CALL]),
        _chat("function_call", content=None, function_call=CALL["function"]),
    ),
    "text/event-stream": (
        _chat_stream("stop", {"content": "你好"}, {"content": "！"}),
        _chat_stream("tool_calls", {"tool_calls": [{"index": 0, **CALL}]}),
        _chat_stream("function_call", {"function_call": CALL["function"]}),
    ),
}

COMPLETION = {"prompt": "从前有座山，", "max_tokens": 32}
TEXT = {"index": 0, "text": "山里有座庙", "logprobs": None, "finish_reason": "length"}
COMPLETION_ANSWERS = {
    "application/json": {
        "id": "cmpl-req-1f",
        "object": "text_completion",
        **MADE,
        "choices": [TEXT],
        "usage": USAGE,
    },
    "text/event-stream": _stream(
        "cmpl-req-1f",
        "text_completion",
        [{**TEXT, "text": "山里有", "finish_reason": None}, {**TEXT, "text": "座庙"}],
    ),
}

def _vector(vector: list[float] | str) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "model": "text2vec-large-chinese",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


EMBEDDING = {"input": "你好"}
EMBEDDING_ANSWERS = {"application/json": (_vector([0.25, -0.5]), _vector("AACAPgAAAL8="))}

MODEL = {"id": "chatglm2-6b", "object": "model", "created": 1700000000, "owned_by": "chatglm-portable"}
MODEL_ANSWERS = {"application/json": MODEL}
MODELS_ANSWERS = {"application/json": {"object": "list", "data": [MODEL]}}

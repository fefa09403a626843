"""Chat completions."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from flask import Response
from pydantic import BeforeValidator, Field

from server.api.dialect import Call
from server.api.dialects.openai.conversation import ChatMessage, conversation
from server.api.dialects.openai.fields import SamplingFields, sentence
from server.api.dialects.openai.reply import Kind, respond
from server.api.dialects.openai.shapes import chat_logprobs, finish_reason, function_body
from server.api.dialects.openai.tools import ToolFields
from server.api.fields import Array, Fields, WholeNumber
from server.api.streaming import Answer
from server.core import GenerationRequest, RequestOutput
from server.errors import BadRequest


def _plain_format(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise sentence(
            f"不支持 {value[:40]}：只有 text，请在提问里说明要什么格式。",
            f"{value[:40]} is not supported, only text; describe the format in the question.",
        )
    return value


class ResponseFormat(Fields):
    type: Annotated[Literal["text"], BeforeValidator(_plain_format)] = Field(description="JSON formats are refused")


class ChatFields(SamplingFields, ToolFields):
    messages: Array[ChatMessage] = Field(
        min_length=1,
        description="the conversation; an assistant's message at its end is continued, and the answer holds what "
        "follows (with echo: all of it)",
    )
    echo: bool = Field(False, description="extension: the answer begins with the message that it continues")
    continue_final_message: bool = Field(
        False, description="extension: 400 unless the last message is an assistant's, which is always continued"
    )
    max_tokens: WholeNumber | None = Field(None, ge=-1, description="tokens of the answer; -1 is no limit")
    max_completion_tokens: WholeNumber | None = Field(None, ge=-1, description="newer name of max_tokens; it wins")
    logprobs: bool = Field(False, description="the log probability of each token of the answer")
    top_logprobs: WholeNumber = Field(
        0, ge=0, le=20, description="with logprobs: also of so many of the likeliest tokens in each place"
    )
    response_format: ResponseFormat = Field(ResponseFormat(type="text"), description="text is the only one")


def chat_completions(call: Call, fields: ChatFields) -> Response:
    """The answer to a conversation, whole or as a stream. Errors of a stream come as an event with an error object."""
    request = _request(call, fields)
    hidden = 0 if fields.echo else len(request.answer_prefix)
    kind = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", partial(_ChatChoice, fields, hidden))
    return respond(call, fields, [request], kind)


def _request(call: Call, fields: ChatFields) -> GenerationRequest:
    messages, prefix = conversation(fields.messages)
    if fields.continue_final_message and len(messages) == len(fields.messages):
        raise BadRequest(
            "continue_final_message 要求最后一条消息是 assistant 的。",
            "With continue_final_message the last message must be an assistant's.",
            param="continue_final_message",
        )
    if fields.top_logprobs and not fields.logprobs:
        raise BadRequest(
            "top_logprobs 需要 logprobs 为 true。", "top_logprobs needs logprobs to be true.", param="top_logprobs"
        )
    tools, tool_choice = fields.offered()
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return GenerationRequest(
        messages=messages,
        answer_prefix=prefix,
        tools=tools,
        tool_choice=tool_choice,
        params=fields.sampling_params(max_tokens=limit, logprobs=fields.top_logprobs if fields.logprobs else None),
        client=call.client,
    )


class _ChatChoice:
    """A ``reply.Choice``; ``hidden`` characters at the answer's beginning are the client's own and not repeated."""

    def __init__(self, fields: ChatFields, hidden: int, index: int, answer: Answer):
        self._fields = fields
        self._hidden = hidden
        self._index = index
        self._stream = answer.stream
        self._calls = 0

    def opening(self) -> list[dict[str, Any]]:
        return [{**self._chunk({"role": "assistant", "content": ""}), **self._prompt()}]

    def chunks(self, output: RequestOutput) -> list[dict[str, Any]]:
        text = self._new_text(output)
        deltas = [{"content": text}] if text else []
        if calls := self._new_calls(output):
            deltas.append(self._called([{"index": i, **body} for i, body in calls]))
        numbers = self._numbers(output)
        if not (deltas or output.finish_reason) and any(numbers.values()):  # tokens of which there is no text yet
            deltas.append({"content": ""})
        bodies = [self._chunk(delta) for delta in deltas]
        if output.finish_reason:
            bodies.append({**self._chunk({}), "finish_reason": self._finish_reason(output)})
        for first in bodies[:1]:
            first.update(numbers)
        return bodies

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        text, calls = self._new_text(output), self._new_calls(output)
        called = self._called([body for _, body in calls]) if calls else {}
        content = None if called and not text else text
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": content, "refusal": None, **called},
            "logprobs": None,
            "finish_reason": self._finish_reason(output) or "stop",
            **self._numbers(output),
            **self._prompt(),
        }

    def _chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _new_text(self, output: RequestOutput) -> str:
        text = output.text[self._hidden :]
        self._hidden -= len(output.text) - len(text)
        return text

    def _new_calls(self, output: RequestOutput) -> list[tuple[int, dict[str, Any]]]:
        """What to say of the output's calls, with their indices; older clients know of one call only."""
        numbered = list(enumerate(output.tool_calls, self._calls))
        self._calls += len(numbered)
        wanted = [(i, call) for i, call in numbered if i == 0 or not self._fields.legacy]
        ids = f"call_{self._stream.request_id}"
        return [(i, {"id": f"{ids}_{i}", "type": "function", "function": function_body(call)}) for i, call in wanted]

    def _called(self, calls: list[dict[str, Any]]) -> dict[str, Any]:
        return {"function_call": calls[0]["function"]} if self._fields.legacy else {"tool_calls": calls}

    def _finish_reason(self, output: RequestOutput) -> str | None:
        called = "function_call" if self._fields.legacy else "tool_calls"
        return finish_reason(output, called if self._calls else "")

    def _numbers(self, output: RequestOutput) -> dict[str, Any]:
        ids = {"token_ids": output.token_ids} if self._fields.return_token_ids else {}
        return {"logprobs": chat_logprobs(output.logprobs), **ids}

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._stream.prompt_ids} if self._fields.return_token_ids else {}

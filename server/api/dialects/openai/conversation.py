"""OpenAI's messages as ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter

from server.api.dialects.openai.fields import encodable, expected, sentence
from server.api.fields import Array, Fields, Text, parse_json
from server.core import Message, ToolCall
from server.errors import BadRequest

OUR_ROLES = {"developer": "system", "tool": "observation", "function": "observation"}


def _text_only(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise sentence(f"这个模型只读文字，不支持 {value[:40]}。", f"this model reads text only, not {value[:40]}.")
    return value


class TextPart(Fields):
    type: Annotated[Literal["text"], BeforeValidator(_text_only)] = Field(description="images and audio are refused")
    text: Text = Field(description="the part's text; parts are joined with line breaks")


_PARTS = TypeAdapter(Array[TextPart])


def _join_parts(value: Any) -> Any:
    if isinstance(value, list):
        return "\n".join(part.text for part in _PARTS.validate_python(value))
    if not isinstance(value, str):
        raise expected("字符串或数组", "a string or an array of parts")
    return value


def _object_text(text: str) -> str:
    """The text of a JSON object; some clients send nothing for a call without arguments."""
    if not text.strip():
        return "{}"
    try:
        value = parse_json(text)
    except BadRequest as error:
        raise sentence(error.zh, error.en) from error
    if not isinstance(value, dict):
        raise expected("一个 JSON 对象的文本", "the text of a JSON object")
    encodable(value)
    return text


Content = Annotated[Text, BeforeValidator(_join_parts, json_schema_input_type=str | Array[TextPart])]


class CalledFunction(Fields):
    name: Text = Field(description="the function's name")
    arguments: Annotated[Text, AfterValidator(_object_text)] = Field(description="its arguments, a JSON object's text")


class CalledTool(Fields):
    function: CalledFunction = Field(description="what was called")


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="who says it; developer is system, tool and function give a tool's result"
    )
    content: Content | None = Field(None, description="a text or text parts; only an assistant's may be absent")
    tool_calls: Array[CalledTool] = Field([], description="what an assistant asked for")
    function_call: CalledFunction | None = Field(None, description="the same as older clients say it")

    def to_core(self) -> Message:
        called = [tool.function for tool in self.tool_calls] or [self.function_call] * bool(self.function_call)
        return Message(
            OUR_ROLES.get(self.role, self.role),
            self.content or "",
            tuple(ToolCall(function.name, function.arguments) for function in called),
        )


def conversation(messages: list[ChatMessage]) -> tuple[tuple[Message, ...], str]:
    """The engine's messages and the answer prefix, which is the text of a trailing assistant message."""
    for index, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            where = f"messages[{index}].content"
            raise BadRequest(f"缺少字段 {where}。", f"The field {where} is missing.", param=where)
    ours = tuple(message.to_core() for message in messages)
    if ours[-1].role != "assistant":
        return ours, ""
    if ours[-1].tool_calls:
        raise BadRequest(
            "最后一条消息要求调用工具，后面应有工具的结果（role 为 tool）。",
            "The last message asks for tools; their results must follow it (role tool).",
            param="messages",
        )
    return ours[:-1], ours[-1].content

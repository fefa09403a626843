"""The tools that a request offers, as tools and tool_choice or as the older functions and function_call."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, TypeAdapter

from server.api.dialects.openai.fields import encodable, expected, sentence
from server.api.fields import Array, Fields, Text
from server.core import Tool
from server.errors import BadRequest

NAME = r"[\w.-]{1,64}"  # it stands in a line of its own in the model's prompts and answers


def _plain_name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise sentence(
            "应为 1 到 64 个字母、数字、_、. 或 -。", "1 to 64 letters, digits and characters of _.- are allowed."
        )
    return name


class Function(Fields):
    name: Annotated[Text, AfterValidator(_plain_name)] = Field(
        description="letters, digits, _ . -, at most 64", json_schema_extra={"pattern": f"^{NAME}$"}
    )
    description: Text = Field("", description="what it does, for the model to know when to call it")
    parameters: Annotated[dict[str, Any], AfterValidator(encodable)] = Field(
        {}, description="a JSON schema of its arguments"
    )


class FunctionTool(Fields):
    type: Literal["function"] = Field("function", description="functions are the only tools")
    function: Function = Field(description="the function that the model may ask for")


class FunctionName(Fields):
    name: Text = Field(description="the function that must be called")


class NamedTool(Fields):
    type: Literal["function"] = Field("function", description="functions are the only tools")
    function: FunctionName = Field(description="the function that must be called")


_NAMED_TOOL, _FUNCTION_NAME = TypeAdapter(NamedTool), TypeAdapter(FunctionName)


def _tool_choice(value: Any) -> str | FunctionName:
    if isinstance(value, dict):
        return _NAMED_TOOL.validate_python(value).function
    if value not in ("none", "auto", "required"):
        raise expected(" none、auto、required 或一个对象", "none, auto, required or an object that names a function")
    return value


def _function_call(value: Any) -> str | FunctionName:
    if isinstance(value, dict):
        return _FUNCTION_NAME.validate_python(value)
    if value not in ("none", "auto"):
        raise expected(" none、auto 或一个对象", "none, auto or an object that names a function")
    return value


ToolChoice = Annotated[
    str | FunctionName,
    PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool),
]
FunctionCall = Annotated[
    str | FunctionName, PlainValidator(_function_call, json_schema_input_type=Literal["none", "auto"] | FunctionName)
]


class ToolFields(Fields):
    tools: Array[FunctionTool] = Field([], description="what the model may ask for; 400 if it was not trained to")
    tool_choice: ToolChoice = Field("auto", description="none: no tool, required: any of them, an object: this one")
    functions: Array[Function] = Field([], description="tools as older clients say it; so is the answer")
    function_call: FunctionCall = Field("auto", description="tool_choice for functions")

    @property
    def legacy(self) -> bool:
        """Whether the answer has function_call instead of tool_calls."""
        return bool(self.functions) and not self.tools

    def offered(self) -> tuple[tuple[Tool, ...], tuple[str, ...]]:
        """The tools, and the names of those one of which must be called."""
        field = "function_call" if self.legacy else "tool_choice"
        functions = self.functions if self.legacy else [tool.function for tool in self.tools]
        choice = getattr(self, field)
        if choice == "none":  # what the model does not know of it cannot call
            return (), ()
        names = tuple(function.name for function in functions)
        wanted = {"auto": (), "required": names}[choice] if isinstance(choice, str) else (choice.name,)
        if choice != "auto" and not (wanted and set(wanted) <= set(names)):
            raise BadRequest(
                f"{field} 要求调用的函数不在请求给出的工具里。",
                f"{field} asks for a function that is not among the tools of the request.",
                param=field,
            )
        return tuple(Tool(f.name, f.description, f.parameters) for f in functions), wanted

"""ChatGLM3's tools: the text that offers them, calls in a conversation, and calls in an answer.

A call is ``<|assistant|>NAME``, a newline and ``tool_call(...)`` with Python's literals in a fence (THUDM/ChatGLM3,
openai_api_demo and tools_using_demo).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from server.core import Message, Tool, ToolCall
from server.errors import BadRequest
from server.models.pieces import without_surrogates

_FUNCTION = "tool_call"
_FENCE = "```"
CALL_OPENING = f"{_FENCE}python\n{_FUNCTION}"

_OFFER = "Answer the following questions as best as you can. You have access to the following tools:"
# a call as an answer without tools shows it: its name, or that of the code interpreter, and its fence
_SHOWN_CALL = re.compile(r"(interpreter|[\w.-]+(?=\n```python\ntool_call\())\n(```python\n.*)", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}
_SOURCE_NAME = "<tool_call>"

# what a model writes is no source code of ours: nobody can mend its backslashes
warnings.filterwarnings("ignore", module=re.escape(_SOURCE_NAME))


def offer(tools: Sequence[Tool]) -> str:
    """The system message that stands in front of a conversation with tools."""
    described = [{"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools]
    return f"{_OFFER}\n{json.dumps(described, indent=4, ensure_ascii=False)}"


def with_metadata(message: Message) -> list[tuple[str, str]]:
    """Metadata line and content of each ChatGLM3 message that one of ours becomes: its text, then its calls.

    A text that is a call, as ``ChatGLM3.display`` shows it to clients that know no tools, becomes that call again.
    Raises BadRequest for arguments that are no JSON object.
    """
    calls = [(call.name, f"{_FENCE}python\n{_source(call)}\n{_FENCE}") for call in message.tool_calls]
    if calls and not message.content:
        return calls
    shown = _SHOWN_CALL.fullmatch(message.content) if message.role == "assistant" else None
    return [(shown[1], shown[2]) if shown else ("", message.content), *calls]


def take_call(part: str, names: Sequence[str], *, ended: bool) -> tuple[str, ToolCall | None]:
    """What is text in one part of an answer, and the call that it begins with if it is one of the tools ``names``.

    What could still become a call is neither until the part has ``ended``; a damaged call is text from then on.
    """
    header, newline, body = part.partition("\n")
    name = header.strip()
    if not newline:
        becomes_call = any(known.startswith(header.lstrip()) or known == name for known in names)
        return "" if becomes_call and not ended else part, None
    if name not in names:
        return part, None
    for source, rest in _fenced(body, ended=ended):
        arguments = _json_arguments(source)
        if arguments is not None:
            return rest, ToolCall(name, arguments)
    return part if ended else "", None


def _fenced(body: str, *, ended: bool) -> Iterator[tuple[str, str]]:
    """What may be the source of a call, shortest first, and the text behind it: a string in it may hold fences too.

    A model that was cut short has not closed its fence.
    """
    body = body.strip()
    if body.startswith(_FENCE):
        body = body.partition("\n")[2]
    for fence in re.finditer(_FENCE, body):
        source = body[: fence.start()].strip()
        if source.endswith(")"):  # spares a parse at every fence of a model that repeats itself
            yield source, body[fence.end() :]
    if ended:
        yield body.strip(), ""


def _source(call: ToolCall) -> str:
    try:
        return _written(json.loads(call.arguments or "{}"))
    except (ValueError, RecursionError):
        given = repr(call.arguments[:100])
        raise BadRequest(
            f"messages 里对工具 {call.name} 的调用，arguments 必须是一个 JSON 对象的文本，而不是 {given}。",
            f"The arguments of a call of {call.name} in messages must be the text of a JSON object, not {given}.",
            param="messages",
        ) from None


def _written(arguments: Any) -> str:
    """A call as ChatGLM3 writes it; names that Python cannot write (``a-b``, ``class``) stand in a ``**{...}``.

    Raises ValueError for arguments that would not read back the same: no object, no finite number.
    """
    meant = _as_json(arguments)
    if isinstance(arguments, dict):
        named = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        for written in (f"{_FUNCTION}({named})", f"{_FUNCTION}(**{arguments!r})"):
            if _json_arguments(written) == meant:
                return written
    raise ValueError("cannot be written as a call")


def _json_arguments(source: str) -> str | None:
    """The arguments of a ``tool_call(...)`` as JSON; None for anything else. Nothing of it is ever run."""
    try:
        call = _JsonNames().visit(ast.parse(source, _SOURCE_NAME, "eval")).body
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == _FUNCTION) or call.args:
            return None
        arguments: dict[str, Any] = {}
        for argument in call.keywords:
            value = ast.literal_eval(argument.value)
            arguments.update(value if argument.arg is None else {argument.arg: value})
        return _as_json(arguments)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # what ast says that it raises
        return None


def _as_json(value: Any) -> str:
    """Raises ValueError or TypeError for what JSON does not have."""
    return without_surrogates(json.dumps(value, ensure_ascii=False, allow_nan=False))


class _JsonNames(ast.NodeTransformer):
    """Models that read JSON write its constants too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node

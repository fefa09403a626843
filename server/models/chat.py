"""What the families' templates share: conversations as rounds, and the part of an answer that may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.core import Message
from server.errors import BadRequest

YEAR = "[[训练时间]]"  # "training time": the models write it where they were taught to name a year


@dataclass
class Round:
    question: str = ""
    answer: str = ""


def rounds_of(messages: Sequence[Message], family: str) -> list[Round]:
    """Messages of any order as rounds, at least one; the last one's answer is empty unless it is to be continued.

    System texts stand directly in front of the last question, as in the official openai_api.py. A question without an
    answer gets an empty one, an answer without a question an empty question, and two answers to one question become
    its lines. Raises BadRequest for a role that these families do not have.
    """
    rounds: list[Round] = []
    system = ""
    speaker = ""
    for message in messages:
        if message.tool_calls or message.role == "observation":
            raise BadRequest(
                f"模型 {family} 不会调用工具，messages 里不能有 tool_calls 和工具的结果；请换用 ChatGLM3。",
                f"The model family {family} cannot call tools, so messages must not have tool_calls or results of "
                "tools; use ChatGLM3.",
                param="messages",
            )
        if message.role == "system":
            system += message.content
            continue
        if message.role == "user":
            rounds.append(Round(question=message.content))
        elif message.role != "assistant":
            raise no_such_role(message.role, family)
        elif speaker == "assistant":
            rounds[-1].answer += "\n" + message.content
        else:
            rounds = rounds or [Round()]
            rounds[-1].answer = message.content
        speaker = message.role
    rounds = rounds or [Round()]
    rounds[-1].question = system + rounds[-1].question
    return rounds


def no_such_role(role: str, family: str) -> BadRequest:
    return BadRequest(
        f"模型 {family} 没有角色 {role!r}。", f"The model family {family} has no role {role!r}.", param="messages"
    )


def shown_part(text: str, *, final: bool, continued: bool) -> str:
    """The text without surrounding whitespace, the year filled in (process_response of the official models).

    Before the end it is also without what may be the beginning of a year. ``continued``: leading whitespace stays.
    """
    text = text if final else without_beginning(text, YEAR)
    return with_year(text.rstrip() if continued else text.strip())


def with_year(text: str) -> str:
    return text.replace(YEAR, "2023年")


def without_beginning(text: str, *markers: str) -> str:
    """The text without what may be the beginning of one of the markers at its end."""
    return text[: len(text) - max(_overlap(text, marker) for marker in markers)]


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker`` without being all of it."""
    return next(length for length in range(min(len(text), len(marker) - 1), -1, -1) if text.endswith(marker[:length]))

"""From a request to the ids that are read: the family's template, and what happens when it is too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from server.core import GenerationRequest, Message, Overflow
from server.errors import BadRequest, ContextOverflow
from server.models.base import Family, Tokenizer

# my-chatglm2's rule: the prompt may fill this share of max_length, the rest is for the answer
_PROMPT_SHARE = 0.8


class Prompt(NamedTuple):
    """``continued``: the answer continues the prompt's text, and every character of it counts."""

    ids: list[int]
    continued: bool


def fit_prompt(family: Family, tokenizer: Tokenizer, request: GenerationRequest, limit: int) -> Prompt:
    """A prompt that leaves room for an answer within the request's max_length, at most the server's ``limit``.

    Raises ContextOverflow where the request's overflow policy cannot make it fit: the query itself is never cut.
    """
    max_length = min(request.params.max_length or limit, limit)
    if request.prompt is not None or request.prompt_ids:
        ids = list(request.prompt_ids) if request.prompt is None else family.encode(tokenizer, request.prompt)
        return _refuse_if_longer(Prompt(ids, True), max_length - 1, max_length, limit)
    if not any(message.role != "system" for message in request.messages):
        raise BadRequest(
            "请求里没有问题：messages 至少要有一条 user 消息。",
            "There is no question: messages needs at least one user message.",
            param="messages",
        )
    system, rounds = split_rounds(request.messages)

    def build(first_round: int) -> Prompt:
        kept = [*system, *(message for turn in rounds[first_round:] for message in turn)]
        ids = family.build_prompt(tokenizer, kept, request.answer_prefix, request.tools)
        return Prompt(ids, family.continues(kept))

    if request.overflow is Overflow.REFUSE:
        return _refuse_if_longer(build(0), max_length - 1, max_length, limit)
    allowed = int(max_length * _PROMPT_SHARE)
    newest = _refuse_if_longer(build(len(rounds) - 1), allowed, max_length, limit)
    oldest_possible = _first_round_that_may_fit(tokenizer, rounds, allowed)
    return _with_more_rounds(build, newest, oldest_possible, len(rounds) - 1, allowed)


def split_rounds(messages: tuple[Message, ...]) -> tuple[list[Message], list[list[Message]]]:
    """Leading system messages, and rounds that each begin with a user message."""
    begin = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    rounds: list[list[Message]] = []
    for message in messages[begin:]:
        if message.role == "user" or not rounds:
            rounds.append([])
        rounds[-1].append(message)
    return list(messages[:begin]), rounds


def _first_round_that_may_fit(tokenizer: Tokenizer, rounds: list[list[Message]], allowed: int) -> int:
    """Index of the oldest round worth trying: from there on the texts alone, without the template, could fit.

    Encodes no more than what is allowed and one round, however long the history is.
    """
    total = 0
    for index in range(len(rounds) - 1, -1, -1):
        total += sum(len(tokenizer.encode(message.content)) for message in rounds[index])
        if total > allowed:
            return index + 1
    return 0


def _with_more_rounds(
    build: Callable[[int], Prompt], fitting: Prompt, first: int, last: int, allowed: int
) -> Prompt:
    """The longest prompt that fits, beginning at a round from ``first`` to ``last``; ``fitting`` begins at ``last``."""
    while first < last:
        middle = (first + last) // 2
        prompt = build(middle)
        if len(prompt.ids) <= allowed:
            fitting, last = prompt, middle
        else:
            first = middle + 1
    return fitting


def _refuse_if_longer(prompt: Prompt, allowed: int, max_length: int, limit: int) -> Prompt:
    if len(prompt.ids) <= allowed:
        return prompt
    if max_length < limit:
        zh, en = "请缩短输入或增大 max_length", "shorten it or raise max_length"
    else:
        zh, en = "这是服务器的上限，请缩短输入", "this is the server's limit, so shorten it"
    length = len(prompt.ids)
    raise ContextOverflow(
        f"输入太长：提问有 {length} 个 token，max_length={max_length} 时最多允许 {allowed} 个；{zh}。",
        f"The input is too long: {length} tokens, and at most {allowed} are allowed with max_length={max_length}; "
        f"{en}.",
    )

"""What was said so far, and asking the next question."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from server.core import FinishReason, GenerationRequest, Message, Overflow, RequestOutput, SamplingParams

POLL = 0.1  # seconds; on Windows a waiting thread hears of Ctrl+C only when its wait is over


class AnswerStream(Protocol):
    """What of ``core.RequestStream`` a conversation reads."""

    def get(self, timeout: float | None = None) -> RequestOutput | None: ...

    def close(self) -> None: ...


class Reply(NamedTuple):
    text: str
    finish_reason: FinishReason


class Conversation:
    """Rounds of question and answer; the oldest are left out of a prompt that would be too long.

    ``submit`` is ``core.Engine.submit`` or the like. Every answer starts with ``prefix``.
    """

    def __init__(self, submit: Callable[[GenerationRequest], AnswerStream], params: SamplingParams, prefix: str = ""):
        self.prefix = prefix
        self._submit = submit
        self._params = params
        self._messages: tuple[Message, ...] = ()

    def clear(self) -> None:
        """Forget what was said."""
        self._messages = ()

    def ask(self, question: str, show: Callable[[str], None], interrupted: Callable[[], bool]) -> Reply:
        """Pass the answer to ``show`` as it comes, until its end or until ``interrupted()``.

        What has come of an interrupted answer is remembered, as my-chatglm2 does; where nothing has come, and where
        the answer fails, neither is the question. Raises ServerError.
        """
        messages = (*self._messages, Message("user", question))
        stream = self._submit(GenerationRequest(
            messages=messages, answer_prefix=self.prefix, overflow=Overflow.DROP_OLDEST, params=self._params
        ))  # fmt: skip
        try:
            text, last = _read(stream, show, interrupted)
        finally:
            stream.close()
        if last.error:
            raise last.error
        if text:
            self._messages = (*messages, Message("assistant", text))
        return Reply(text, last.finish_reason)


def _read(
    stream: AnswerStream, show: Callable[[str], None], interrupted: Callable[[], bool]
) -> tuple[str, RequestOutput]:
    """The whole text, and the output that ended it."""
    text = ""
    while True:
        if interrupted():
            stream.close()
        output = stream.get(POLL)
        if output and output.text:
            text += output.text
            show(output.text)
        if output and output.finish_reason:
            return text, output

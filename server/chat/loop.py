"""The loop of a chat: reads what is typed, carries out commands, asks the questions."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from server.chat.conversation import Conversation
from server.core import FinishReason
from server.errors import ServerError

# clear and stop are the official cli_demo.py's, the other words what people try
_WORDS = {"clear": "clear", "stop": "stop", "exit": "stop", "quit": "stop"}
_COMMANDS = {**_WORDS, "help": "help"}

_HELP = (
    """\
/prefix 文字   以后的回答都以这些文字开头；只写 /prefix 就取消
clear          清空对话历史
stop           退出，也可以写 exit，或按 Ctrl+D
/help          显示这些说明
Ctrl+C         停止正在生成的回答，已有的文字留在对话里
Alt+Enter      换行，也可以在行末写 \\；粘贴进来的多行文字是一个问题""",
    """\
/prefix TEXT   answers start with TEXT from now on; /prefix alone ends that
clear          forgets the conversation so far
stop           leaves; so do exit and Ctrl+D
/help          shows this page
Ctrl+C         stops the answer that is coming; its text so far stays in the conversation
Alt+Enter      starts a new line; so does \\ at the end of one. Pasted lines are one question""",
)


class Screen(Protocol):
    """Where a chat takes place."""

    def read(self, draft: str) -> str | None:
        """What was typed, with ``draft`` to begin with; None when the user leaves."""

    def answering(self) -> AbstractContextManager[Callable[[], bool]]:
        """Around an answer; gives a function that tells whether the user interrupts it."""

    def show(self, text: str) -> None:
        """A piece of an answer."""

    def notice(self, text: str) -> None:
        """A remark of the program's."""

    def fail(self, text: str) -> None:
        """The sentence of a failure."""

    def clear(self) -> None:
        """Begin anew."""


def command_of(typed: str) -> tuple[str, str]:
    """The name of a command, "" for a question, and what follows it; an unknown name is given with its slash."""
    words = typed.strip()
    if words in _WORDS:
        return _WORDS[words], ""
    if re.match(r"/prefix(\s|$)", typed):
        return "prefix", typed[len("/prefix ") :].rstrip("\n")
    # with more behind it, it is a question: "/generate 怎么用？"
    return _COMMANDS.get(words[1:], words) if re.fullmatch(r"/[a-z]+\s*", typed) else "", ""


class Chat:
    """One user's chat; ``language`` is "zh" or "en"."""

    def __init__(self, conversation: Conversation, screen: Screen, language: str):
        self._conversation = conversation
        self._screen = screen
        self._zh = language == "zh"
        self._language = language

    def run(self) -> None:
        """Until the user leaves."""
        draft = ""
        while (typed := self._screen.read(draft)) is not None:
            draft = ""
            name, argument = command_of(typed)
            if name == "stop":
                return
            if name:
                draft = self._carry_out(name, argument, typed)
            elif typed.strip():
                draft = self._ask(typed.rstrip())

    def _carry_out(self, name: str, argument: str, typed: str) -> str:
        """Returns what to mend, if anything."""
        if name == "clear":
            self._conversation.clear()
            self._screen.clear()
        elif name == "help":
            self._say(*_HELP)
        elif name == "prefix":
            self._conversation.prefix = argument
            if argument:
                self._say(f"以后的回答以“{argument}”开头。", f'Answers start with "{argument}" from now on.')
            else:
                self._say("以后的回答没有固定的开头。", "Answers have no fixed beginning from now on.")
        else:
            self._say(
                f"没有命令 {name}：/help 列出所有命令；要把它发给模型，请在前面加一个空格。",
                f"There is no command {name}: /help lists them; put a space in front to send it to the model.",
            )
            return typed
        return ""

    def _ask(self, question: str) -> str:
        """Returns the question if there is no answer to it, to be mended or asked again."""
        try:
            with self._screen.answering() as interrupted:
                reply = self._conversation.ask(question, self._screen.show, interrupted)
        except ServerError as error:
            self._screen.fail(error.text(self._language))
            return question
        if reply.finish_reason is FinishReason.LENGTH:
            self._say("（达到长度上限，回答不完整）", "(cut off: the length limit is reached)")
        if reply.finish_reason is not FinishReason.ABORT:
            return ""
        if reply.text:
            self._say("（已停止，以上文字留在对话里）", "(stopped; the text above stays in the conversation)")
            return ""
        self._say("（已停止，还没有回答）", "(stopped before there was an answer)")
        return question

    def _say(self, zh: str, en: str) -> None:
        self._screen.notice(zh if self._zh else en)

"""The family CodeGeeX2: code behind a language tag is continued, everything else is a question."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.core import Message, Tool
from server.models.chat import Round, rounds_of
from server.models.chatglm2.prompt import ChatGLM2
from server.models.chatglm2.tokenizer import ChatGLM2Tokenizer
from server.models.generations import CODEGEEX2, generation

# a comment that says ``language: X`` and nothing else, in any language's form (THUDM/CodeGeeX2, evaluation/utils.py)
_TAG = re.compile(
    r"""(?:\#|//|--|<!--|/\*|\(\*|;|%|''?|\{|!|\*|\.\.|>)  # what opens it
    [ \t]*language:[ \t]*
    [a-z][a-z0-9+\#. -]{0,29}?  # the longest name is Literate CoffeeScript
    [ \t]*(?:-->|\*/|\*\)|\})?[ \t]*\r?(?:\n|$)""",
    re.IGNORECASE | re.VERBOSE,
)


class CodeGeeX2(ChatGLM2):
    """CodeGeeX2-6B: ChatGLM2's network and tokenizer code, trained on code and not on chats."""

    name = CODEGEEX2

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return generation(config, folder) == self.name

    def build_prompt(
        self,
        tokenizer: ChatGLM2Tokenizer,
        messages: Sequence[Message],
        answer_prefix: str = "",
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """[gMASK] sop, then code with its tag as it is (README.md, generate), or questions and answers as lines that
        begin with 问： and 答： (evaluation/utils.py, instruction mode). An answer at the end is continued.
        """
        rounds = rounds_of(messages, self.name)
        if _is_code(rounds):
            text = rounds[0].question + rounds[0].answer
        else:
            text = "\n".join(f"问：{turn.question}\n答：{turn.answer}" for turn in rounds)
        return self.encode(tokenizer, text + answer_prefix)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Leading newlines and indentation are part of the code, and so is whatever looks like something to fill in."""
        return _is_code(rounds_of(messages, self.name))


def _is_code(rounds: Sequence[Round]) -> bool:
    return len(rounds) == 1 and _TAG.match(rounds[0].question) is not None

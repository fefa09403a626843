"""The family ChatGLM-6B: its template, and how its answers are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.core import Message, Tool
from server.kernels.ops import Ops
from server.models.chat import rounds_of, shown_part
from server.models.chatglm.model import ChatGLMNetwork, NetworkConfig
from server.models.chatglm.tokenizer import ChatGLMTokenizer
from server.models.fields import number
from server.models.files import read_json
from server.models.generations import CHATGLM, generation

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_CHINESE = "\u4e00-\u9fff"


class ChatGLM:
    """ChatGLM-6B: numbered rounds, then [gMASK] <sop> and the answer."""

    name = CHATGLM
    tokenizer_file = "ice_text.model"
    causal_prompt = False
    takes_tools = False

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return generation(config, folder) == self.name

    def load_tokenizer(self, folder: Path) -> ChatGLMTokenizer:
        """In the releases before April 2023 every id is 20000 higher, which config.json alone shows."""
        config = folder / "config.json"
        bos_id = number(read_json(config), "bos_token_id", int) if config.is_file() else None
        return ChatGLMTokenizer.load(folder / self.tokenizer_file, bos_id)

    def build_network(self, config: Mapping[str, Any], ops: Ops) -> ChatGLMNetwork:
        return ChatGLMNetwork(NetworkConfig.read(config), ops)

    def encode(self, tokenizer: ChatGLMTokenizer, text: str) -> list[int]:
        return [*tokenizer.encode(text), tokenizer.gmask_id, tokenizer.bos_id]

    def build_prompt(
        self,
        tokenizer: ChatGLMTokenizer,
        messages: Sequence[Message],
        answer_prefix: str = "",
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """The rounds as text, [gMASK], <sop> (modeling_chatglm.py, chat); the answer prefix stands behind <sop>.

        A first question stands alone, without a round's number. An answer at the end is continued.
        """
        rounds = rounds_of(messages, self.name)
        begun = rounds[-1].answer + answer_prefix
        rounds[-1].answer = ""
        text = "\n".join(f"[Round {i}]\n问：{turn.question}\n答：{turn.answer}" for i, turn in enumerate(rounds))
        text = text if len(rounds) > 1 else rounds[0].question
        return self.encode(tokenizer, text) + tokenizer.encode(begun)

    def continues(self, messages: Sequence[Message]) -> bool:
        return False

    def stop_ids(self, tokenizer: ChatGLMTokenizer) -> frozenset[int]:
        return frozenset({tokenizer.eos_id})

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        """Punctuation beside a Chinese character becomes full-width, so one at the end waits for what follows it."""
        if not final and text.endswith(tuple(_FULL_WIDTH)):
            text = text[:-1]
        shown = shown_part(text, final=final, continued=continued)
        for mark, full_width in _FULL_WIDTH.items():
            shown = re.sub(rf"([{_CHINESE}])\{mark}", rf"\1{full_width}", shown)
            shown = re.sub(rf"\{mark}([{_CHINESE}])", rf"{full_width}\1", shown)
        return shown

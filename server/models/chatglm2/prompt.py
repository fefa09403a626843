"""The families ChatGLM2 and ChatGLM3: their templates, and how their answers are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.core import Message, Tool
from server.kernels.ops import Ops
from server.models.base import Shown
from server.models.chat import YEAR, no_such_role, rounds_of, shown_part, with_year, without_beginning
from server.models.chatglm2.model import ROTARY_BASE, ChatGLM2Network, NetworkConfig, Rotary
from server.models.chatglm2.tokenizer import ROLE_TOKENS, SPECIAL_TOKENS, ChatGLM2Tokenizer
from server.models.chatglm2.tools import CALL_OPENING, offer, take_call, with_metadata
from server.models.generations import CHATGLM2, CHATGLM3, generation

_ASSISTANT = "<|assistant|>"


class ChatGLM2:
    """ChatGLM2-6B and ChatGLM2-6B-32k: one text of numbered rounds."""

    name = CHATGLM2
    tokenizer_file = "tokenizer.model"
    causal_prompt = True
    takes_tools = False

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return generation(config, folder) == CHATGLM2

    def load_tokenizer(self, folder: Path) -> ChatGLM2Tokenizer:
        return ChatGLM2Tokenizer.load(folder / self.tokenizer_file, SPECIAL_TOKENS, shows_special=False)

    def build_network(self, config: Mapping[str, Any], ops: Ops) -> ChatGLM2Network:
        """The 32k variant's rope_ratio divides positions (linear interpolation)."""
        read = NetworkConfig.read(config)
        return ChatGLM2Network(read, ops, Rotary(read.kv_channels // 2, divisor=read.rope_ratio))

    def encode(self, tokenizer: ChatGLM2Tokenizer, text: str) -> list[int]:
        return _with_start(tokenizer, tokenizer.encode(text))

    def build_prompt(
        self,
        tokenizer: ChatGLM2Tokenizer,
        messages: Sequence[Message],
        answer_prefix: str = "",
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """[gMASK] sop, then the rounds as one text that ends in ``答：`` (modeling_chatglm.py, build_prompt).

        An answer at the end is continued.
        """
        rounds = enumerate(rounds_of(messages, self.name), 1)
        text = "\n\n".join(f"[Round {i}]\n\n问：{turn.question}\n\n答：{turn.answer}" for i, turn in rounds)
        return self.encode(tokenizer, text + answer_prefix)

    def continues(self, messages: Sequence[Message]) -> bool:
        return False

    def stop_ids(self, tokenizer: ChatGLM2Tokenizer) -> frozenset[int]:
        return frozenset({tokenizer.eos_id})

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        return shown_part(text, final=final, continued=continued)


class ChatGLM3:
    """ChatGLM3-6B, also 32k and 128k: messages with role tokens, the network and tokenizer of ChatGLM2."""

    name = CHATGLM3
    tokenizer_file = "tokenizer.model"
    causal_prompt = True
    takes_tools = True

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return generation(config, folder) == CHATGLM3

    def load_tokenizer(self, folder: Path) -> ChatGLM2Tokenizer:
        return ChatGLM2Tokenizer.load(folder / self.tokenizer_file, SPECIAL_TOKENS + ROLE_TOKENS, shows_special=True)

    def build_network(self, config: Mapping[str, Any], ops: Ops) -> ChatGLM2Network:
        """The long variants' rope_ratio multiplies the base, unlike ChatGLM2's."""
        read = NetworkConfig.read(config)
        return ChatGLM2Network(read, ops, Rotary(read.kv_channels // 2, base=ROTARY_BASE * read.rope_ratio))

    def encode(self, tokenizer: ChatGLM2Tokenizer, text: str) -> list[int]:
        return _with_start(tokenizer, tokenizer.encode(text))

    def build_prompt(
        self,
        tokenizer: ChatGLM2Tokenizer,
        messages: Sequence[Message],
        answer_prefix: str = "",
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """[gMASK] sop, then <|role|>, header and content of each message, and <|assistant|> (tokenization_chatglm.py).

        Header (a metadata line, mostly empty) and content are encoded apart, so each begins with its own space piece.
        Without a prefix the prompt ends with <|assistant|> and the model writes the header itself (30910, 13). With
        one it ends with the header and the prefix, which is how an earlier answer looks, and how the model was trained
        to see the beginning of one. An assistant message at the end is continued, unless it ends with a call.

        The tools are offered by a system message in front of all others (the official openai_api.py drops the user's).
        """
        special = tokenizer.special_ids
        messages = [*([Message("system", offer(tools))] if tools else ()), *messages]
        ends_open = bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls
        begun = messages.pop().content if ends_open else ""
        ids: list[int] = []
        for message in messages:
            role = special.get(f"<|{message.role}|>")
            if role is None:
                raise no_such_role(message.role, self.name)
            for metadata, content in with_metadata(message):
                ids += [role, *tokenizer.encode(f"{metadata}\n"), *tokenizer.encode(content)]
        ids.append(special[_ASSISTANT])
        if begun + answer_prefix:
            ids += [*tokenizer.encode("\n"), *tokenizer.encode(begun + answer_prefix)]
        return _with_start(tokenizer, ids)

    def continues(self, messages: Sequence[Message]) -> bool:
        return False

    def stop_ids(self, tokenizer: ChatGLM2Tokenizer) -> frozenset[int]:
        special = tokenizer.special_ids
        return frozenset({tokenizer.eos_id, special["<|user|>"], special["<|observation|>"]})

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        """The empty metadata line in front of an answer goes with the whitespace around it.

        The name of a tool, which stands there when the model calls one, stays: who reads the call needs it. An answer
        in several parts (<|assistant|> between them) is shown in full, one part below the other, where the official
        code takes back all but the last.
        """
        return self.display_calls(text, (), final=final, continued=continued).text

    def call_openings(self, tokenizer: ChatGLM2Tokenizer, names: Sequence[str]) -> list[list[int]]:
        """They end in front of the bracket, so that the model cuts what follows into pieces as it learned to."""
        return [[*tokenizer.encode(f"{name}\n"), *tokenizer.encode(CALL_OPENING)] for name in names]

    def display_calls(self, text: str, names: Sequence[str], *, final: bool, continued: bool = False) -> Shown:
        """A part of an answer that has the name of an offered tool for its metadata is a call of it."""
        parts = (text if final else without_beginning(text, YEAR, _ASSISTANT)).split(_ASSISTANT)
        texts = [parts.pop(0).rstrip()] if continued else []
        calls = []
        for count, part in enumerate(parts, 1):
            shown, call = take_call(part, names, ended=final or count < len(parts))
            texts += filter(None, [shown.strip()])
            calls += filter(None, [call])
        return Shown(with_year("\n".join(texts)), tuple(calls))


def _with_start(tokenizer: ChatGLM2Tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.special_ids["[gMASK]"], tokenizer.special_ids["sop"], *ids]

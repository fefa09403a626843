"""The families ChatGLM2 and ChatGLM3: how to recognise them, their templates, and how their answers are shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.core import Message
from server.errors import BadRequest
from server.kernels.ops import Ops
from server.models.chatglm2.model import ROTARY_BASE, ChatGLM2Network, NetworkConfig, Rotary
from server.models.chatglm2.tokenizer import ROLE_TOKENS, SPECIAL_TOKENS, ChatGLM2Tokenizer

_YEAR = "[[训练时间]]"  # "training time": the models write it where a year belongs
_ASSISTANT = "<|assistant|>"
_TOOL_CALL = re.compile(r"(interpreter|[\w.-]+(?=\n```python\ntool_call\())\n(```python\n.*)", re.DOTALL)


class ChatGLM2:
    """ChatGLM2-6B and ChatGLM2-6B-32k: one text of numbered rounds."""

    name = "chatglm2"
    causal_prompt = True

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return _is_block(config) and not _has_roles(config, folder)

    def load_tokenizer(self, folder: Path) -> ChatGLM2Tokenizer:
        return ChatGLM2Tokenizer.load(folder / "tokenizer.model", SPECIAL_TOKENS, shows_special=False)

    def build_network(self, config: Mapping[str, Any], ops: Ops) -> ChatGLM2Network:
        """The 32k variant's rope_ratio divides positions (linear interpolation)."""
        read = NetworkConfig.read(config)
        return ChatGLM2Network(read, ops, Rotary(read.kv_channels // 2, divisor=read.rope_ratio))

    def build_prompt(
        self, tokenizer: ChatGLM2Tokenizer, messages: Sequence[Message], answer_prefix: str = ""
    ) -> list[int]:
        """[gMASK] sop, then the rounds as one text that ends in ``答：`` (modeling_chatglm.py, build_prompt).

        A system text stands directly in front of the last question, as in the official openai_api.py. A question
        without an answer gets an empty one, an answer without a question an empty question, two answers to one
        question become lines; an answer at the end is continued.
        """
        text = _rounds_text(messages) + answer_prefix
        special = tokenizer.special_ids
        return [special["[gMASK]"], special["sop"], *tokenizer.encode(text)]

    def stop_ids(self, tokenizer: ChatGLM2Tokenizer) -> frozenset[int]:
        return frozenset({tokenizer.eos_id})

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        return _shown(text, (_YEAR,), final=final, continued=continued).replace(_YEAR, "2023年")


class ChatGLM3:
    """ChatGLM3-6B, also 32k and 128k: messages with role tokens, the network and tokenizer of ChatGLM2."""

    name = "chatglm3"
    causal_prompt = True

    def matches(self, config: Mapping[str, Any], folder: Path) -> bool:
        return _is_block(config) and _has_roles(config, folder)

    def load_tokenizer(self, folder: Path) -> ChatGLM2Tokenizer:
        return ChatGLM2Tokenizer.load(folder / "tokenizer.model", SPECIAL_TOKENS + ROLE_TOKENS, shows_special=True)

    def build_network(self, config: Mapping[str, Any], ops: Ops) -> ChatGLM2Network:
        """The long variants' rope_ratio multiplies the base, unlike ChatGLM2's."""
        read = NetworkConfig.read(config)
        return ChatGLM2Network(read, ops, Rotary(read.kv_channels // 2, base=ROTARY_BASE * read.rope_ratio))

    def build_prompt(
        self, tokenizer: ChatGLM2Tokenizer, messages: Sequence[Message], answer_prefix: str = ""
    ) -> list[int]:
        """[gMASK] sop, then <|role|>, header and content of each message, and <|assistant|> (tokenization_chatglm.py).

        Header (a metadata line, mostly empty) and content are encoded apart, so each begins with its own space piece.
        Without a prefix the prompt ends with <|assistant|> and the model writes the header itself (30910, 13). With
        one it ends with the header and the prefix, which is how an earlier answer looks, and how the model was trained
        to see the beginning of one. An assistant message at the end is continued.
        """
        special = tokenizer.special_ids
        messages = list(messages)
        begun = messages.pop().content if messages and messages[-1].role == "assistant" else ""
        ids = [special["[gMASK]"], special["sop"]]
        for message in messages:
            role = special.get(f"<|{message.role}|>")
            if role is None:
                raise _no_such_role(message.role, self.name)
            metadata, content = _metadata(message)
            ids += [role, *tokenizer.encode(f"{metadata}\n"), *tokenizer.encode(content)]
        ids.append(special[_ASSISTANT])
        if begun + answer_prefix:
            ids += [*tokenizer.encode("\n"), *tokenizer.encode(begun + answer_prefix)]
        return ids

    def stop_ids(self, tokenizer: ChatGLM2Tokenizer) -> frozenset[int]:
        special = tokenizer.special_ids
        return frozenset({tokenizer.eos_id, special["<|user|>"], special["<|observation|>"]})

    def display(self, text: str, *, final: bool, continued: bool = False) -> str:
        """The empty metadata line in front of an answer goes with the whitespace around it.

        The name of a tool, which stands there when the model calls one, stays: who reads the call needs it. An answer
        in several parts (<|assistant|> between them) is shown in full, one part below the other, where the official
        code takes back all but the last.
        """
        shown = _shown(text, (_YEAR, _ASSISTANT), final=final, continued=continued).replace(_YEAR, "2023年")
        first, *others = shown.split(_ASSISTANT)
        return "\n".join(filter(None, [first.rstrip(), *(part.strip() for part in others)]))


def _is_block(config: Mapping[str, Any]) -> bool:
    """All generations say model_type chatglm; these two fields came with ChatGLM2."""
    return "padded_vocab_size" in config and "multi_query_attention" in config


def _has_roles(config: Mapping[str, Any], folder: Path) -> bool:
    """ChatGLM3 differs from ChatGLM2 in its tokenizer's code alone, which is read here and never run.

    Without that file the model's own name decides, then the folder's; the answer then defaults to ChatGLM2.
    """
    code = folder / "tokenization_chatglm.py"
    if code.is_file():
        return "<|user|>" in code.read_text(encoding="utf-8", errors="replace")
    return any("chatglm3" in name.lower() for name in (str(config.get("_name_or_path", "")), folder.name))


def _rounds_text(messages: Sequence[Message]) -> str:
    rounds: list[list[str | None]] = []  # question, answer or None
    system = ""
    for message in messages:
        if message.role == "system":
            system += message.content
        elif message.role == "user":
            rounds.append([message.content, None])
        elif message.role != "assistant":
            raise _no_such_role(message.role, ChatGLM2.name)
        elif rounds and rounds[-1][1] is None:
            rounds[-1][1] = message.content
        elif rounds:
            rounds[-1][1] += "\n" + message.content
        else:
            rounds.append(["", message.content])
    if not rounds:
        rounds.append(["", None])
    rounds[-1][0] = system + rounds[-1][0]
    return "\n\n".join(f"[Round {i}]\n\n问：{q}\n\n答：{a or ''}" for i, (q, a) in enumerate(rounds, 1))


def _metadata(message: Message) -> tuple[str, str]:
    """Metadata line and content of a ChatGLM3 message: a call as ``display`` shows it has the tool's name in front."""
    call = _TOOL_CALL.fullmatch(message.content) if message.role == "assistant" else None
    return (call[1], call[2]) if call else ("", message.content)


def _no_such_role(role: str, family: str) -> BadRequest:
    return BadRequest(
        f"模型 {family} 没有角色 {role!r}。", f"The model family {family} has no role {role!r}.", param="messages"
    )


def _shown(text: str, markers: Sequence[str], *, final: bool, continued: bool) -> str:
    """The text without surrounding whitespace; before the end also without what may be the beginning of a marker."""
    if not final:
        text = text[: len(text) - max(_overlap(text, marker) for marker in markers)]
    return text.rstrip() if continued else text.strip()


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that begins ``marker`` without being all of it."""
    return next(length for length in range(min(len(text), len(marker) - 1), -1, -1) if text.endswith(marker[:length]))

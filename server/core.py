"""The types that the API, the engine and remote engines share. Standard library only."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from server.errors import ServerError


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"  # the model's end token or a stop string
    LENGTH = "length"  # max_tokens or max_length was reached
    ABORT = "abort"  # the caller closed it or interrupted it
    ERROR = "error"  # RequestOutput.error says what happened


class Overflow(str, Enum):
    """What to do with a prompt that is too long."""

    DROP_OLDEST = "drop_oldest"  # drop the oldest rounds until 80% of max_length is enough (my-chatglm2)
    REFUSE = "refuse"


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for; ``parameters`` is a JSON schema, as in OpenAI's protocol."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """What the model asks for; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is system, user, assistant or observation (a tool's result).

    ``tool_calls`` are what an assistant asked for behind its ``content``.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn and when the answer ends.

    Order as in transformers: penalties, temperature, top_k, top_p. ``temperature`` 0 is greedy, ``top_k`` 0 and
    ``top_p`` 1 are off. ``repetition_penalty`` counts prompt and answer (transformers), the presence and frequency
    penalties the answer alone (OpenAI). ``max_length`` limits prompt and answer together, ``max_tokens`` the answer (0:
    the prompt is read and nothing drawn); None leaves the server's own limit. ``logit_bias`` is added to the logits of
    the ids it names, before everything else. ``logprobs`` asks for the log probability of every token of the answer
    and of that many of the likeliest ones in its place, ``prompt_logprobs`` for the same of the prompt's tokens; both
    as the model computed them, before bias, penalties and temperature.
    """

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 50
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_length: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """What a dialect asks of an engine.

    One of ``messages`` (the family's own template is applied, ending before the answer), ``prompt`` (a text without a
    template, encoded as the family's official tokenizer does, with its special tokens) and ``prompt_ids`` (used as
    they are). The answer to a ``prompt`` or to ids continues it: nothing is stripped or replaced in it.

    ``answer_prefix`` is put directly behind the template and the answer starts with it. ``tools`` are offered to the
    model with the messages; ``tool_choice`` names those of them one of which the answer must call. ``client`` is the
    caller's address: ``Engine.abort(client=...)`` stops what came from it.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    prompt_ids: tuple[int, ...] = ()
    answer_prefix: str = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: tuple[str, ...] = ()
    overflow: Overflow = Overflow.REFUSE
    params: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""


@dataclass(frozen=True)
class Usage:
    """Token counts; ``cached_tokens`` of the prompt were found in a slot and not read again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability; ``top`` are the likeliest tokens in its place.

    ``data`` is what the token stands for in UTF-8, which may be a part of a character or nothing. ``logprob`` is None
    for a prompt's first token, which nothing comes before.
    """

    token_id: int
    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """``data`` as text, with U+FFFD for parts of characters."""
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class RequestOutput:
    """The next piece of an answer: ``text`` is new and final, never half a character, never taken back.

    The first piece contains the answer prefix. ``logprobs`` has one entry for each of ``token_ids`` if they were asked
    for. A tool call comes whole, and no text of it before. ``prompt_logprobs``, if asked for, is set once, on the first
    piece that has a token or on the last one; ``finish_reason`` and ``usage`` on the last one only, ``error`` on a last
    one with FinishReason.ERROR, ``end`` (if logprobs were asked for) on one after a token with which the model itself
    ended the answer.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ServerError | None = None
    end: TokenLogprob | None = None


@dataclass(frozen=True)
class Tokenization:
    """A text's sentencepiece ids and pieces, without special tokens.

    ``prompt_ids`` are the same ids with the family's special tokens, as its official tokenizer puts them.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Embeddings:
    """One vector of float32 per text, and how many tokens were read for all of them."""

    vectors: tuple[array[float], ...]
    prompt_tokens: int


class RequestStream(Protocol):
    """One running answer, read by one thread. The model was given ``prompt_ids``, which say ``prompt_text``."""

    request_id: str
    prompt_ids: tuple[int, ...]
    prompt_text: str

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        """The next output, or None if there is nothing new within ``timeout`` seconds (or after the last one)."""

    def __iter__(self) -> Iterator[RequestOutput]:
        """All outputs up to and with the one that has a finish reason."""

    def close(self) -> None:
        """Stop generating before the next token; idempotent, from any thread.

        A reader in another thread still gets what was made, ending with FinishReason.ABORT.
        """


class Engine(Protocol):
    """Something that answers: the local engine, later a remote one."""

    model_name: str
    embedding_model: str
    max_length: int  # tokens, prompt and answer
    slots: int  # requests that are answered at the same time
    capacity: int  # requests that can be held at once, running and waiting

    def submit(self, request: GenerationRequest) -> RequestStream:
        """Build the prompt, admit the request and start it.

        Raises BadRequest, ContextOverflow or Overloaded before anything is generated, so that every error of the
        caller's is known before the status line is sent.
        """

    def abort(self, *, request_id: str | None = None, client: str | None = None) -> int:
        """Interrupt the named request, or all of one client's; returns how many were running or waiting."""

    def tokenize(self, text: str) -> Tokenization:
        """Cut a text as the model's own tokenizer does."""

    def embed(self, texts: Sequence[str], gone: Callable[[], bool] = lambda: False) -> Embeddings:
        """The sentence model's vectors of the texts, in their order; texts of more than 256 tokens are cut.

        Raises Unavailable if there is no sentence model and none can be had, GenerationFailed once ``gone()`` says that
        nobody waits for the rest.
        """

    def free_caches(self) -> None:
        """Give back memory that only makes later requests faster; running answers go on."""

    def close(self, timeout: float | None = None) -> None:
        """End everything with ShuttingDown, after what was made, and wait for the engine's thread to end."""

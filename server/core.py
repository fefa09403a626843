"""The types that the API, the engine and remote engines share. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from server.errors import ServerError


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"  # the model's end token or a stop string
    LENGTH = "length"  # max_tokens or max_length was reached
    ABORT = "abort"  # the caller closed it, interrupted it, or the server is stopping
    ERROR = "error"  # RequestOutput.error says what happened


class Overflow(str, Enum):
    """What to do with a prompt that is too long."""

    DROP_OLDEST = "drop_oldest"  # drop the oldest rounds until 80% of max_length is enough (my-chatglm2)
    REFUSE = "refuse"


@dataclass(frozen=True)
class Message:
    """One turn; ``role`` is system, user, assistant or observation (ChatGLM3's tool result)."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn and when the answer ends.

    Order as in transformers: penalties, temperature, top_k, top_p. ``temperature`` 0 is greedy, ``top_k`` 0 and
    ``top_p`` 1 are off. ``repetition_penalty`` counts prompt and answer (transformers), the presence and frequency
    penalties the answer alone (OpenAI). ``max_length`` limits prompt and answer together, ``max_tokens`` the answer;
    None leaves the server's own limit.
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


@dataclass(frozen=True)
class GenerationRequest:
    """What a dialect asks of an engine.

    Either ``messages`` (the family's own template is applied, ending before the answer) or ``prompt_ids`` (used as
    they are). ``answer_prefix`` is put directly behind the template and the answer starts with it. ``client`` is the
    caller's address: ``Engine.abort(client=...)`` stops what came from it.
    """

    messages: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    answer_prefix: str = ""
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
class RequestOutput:
    """The next piece of an answer: ``text`` is new and final, never half a character, never taken back.

    The first piece contains the answer prefix. ``finish_reason`` and ``usage`` are set on the last one only, ``error``
    on a last one with FinishReason.ERROR.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ServerError | None = None


@dataclass(frozen=True)
class Tokenization:
    """A text's sentencepiece ids and pieces, without special tokens."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]


class RequestStream(Protocol):
    """One running answer; read by one thread."""

    request_id: str

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
    max_length: int  # tokens, prompt and answer
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

    def close(self, timeout: float | None = None) -> None:
        """Interrupt everything, let the readers have what was made, and wait for the engine's thread to end."""

"""Puts a chat together: who answers, and where the questions are typed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

from server.chat.conversation import AnswerStream, Conversation
from server.chat.lines import Lines
from server.chat.loop import Chat
from server.config import Config
from server.core import GenerationRequest, SamplingParams

Submit = Callable[[GenerationRequest], AnswerStream]


def chat(config: Config) -> int:
    """Chat until the user leaves or the input ends; returns the exit code, 1 if a piped question was not answered.

    Raises StartupError for a server that is not there, or a model that is not there or does not fit.
    """
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    params = SamplingParams(temperature=config.temperature, top_p=config.top_p, max_length=config.max_length)
    with _remote(config) if config.url else _local(config, in_terminal) as (greeting, submit):
        conversation = Conversation(submit, params, config.prefix)
        if in_terminal:
            from server.chat.terminal import Terminal

            Chat(conversation, Terminal(greeting, config.language), config.language).run()
            return 0
        lines = Lines()
        Chat(conversation, lines, config.language).run()
        return int(lines.failed)


@contextlib.contextmanager
def _remote(config: Config) -> Iterator[tuple[str, Submit]]:
    from server.chat.remote import RemoteServer

    server = RemoteServer(config.url, config.language)
    server.check()
    yield _greeting(config, f"已连接 {server.url}", f"Connected to {server.url}"), server.submit


@contextlib.contextmanager
def _local(config: Config, in_terminal: bool) -> Iterator[tuple[str, Submit]]:
    from server.assembly import build_engine, prepare, print_choice, print_warnings, speaker

    # one answer at a time, and a place to wait: an interrupted one leaves its slot a moment later
    config = dataclasses.replace(config, slots=1, queue=1, keep=0)
    say = speaker(config)
    # in a pipe, standard output is for answers alone
    with contextlib.nullcontext() if in_terminal else contextlib.redirect_stdout(sys.stderr):
        folder, profile = prepare(config)
        if in_terminal:
            print_choice(say, config, folder, profile)
        print_warnings(say, profile)
    engine = build_engine(config, folder, profile)
    try:
        name = engine.model_name
        yield _greeting(config, f"欢迎使用 {name} 模型", f"Welcome to {name}"), engine.submit
    finally:
        engine.close(timeout=2)


def _greeting(config: Config, zh: str, en: str) -> str:
    if config.language == "zh":
        return f"{zh}。\n输入内容即可进行对话，clear 清空对话历史，stop 终止程序，/help 查看说明。"
    return f"{en}.\nType to talk; clear forgets the conversation, stop leaves, /help says more."

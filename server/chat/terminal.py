"""A chat in a terminal: line editing by prompt_toolkit, answers as they come."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import get_app
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import clear


class Terminal:
    """See ``loop.Screen``. What was typed before is found with the arrow keys and written to no file."""

    def __init__(self, welcome: str, language: str):
        self._welcome = welcome
        self._zh = language == "zh"
        self._session: PromptSession[str] = PromptSession(
            message="用户：" if self._zh else "You: ",
            multiline=True,
            key_bindings=_keys(),
            enable_suspend=True,
        )
        self._interrupted = threading.Event()
        # for the whole chat: Ctrl+C just before or after an answer must not end the program
        signal.signal(signal.SIGINT, lambda *_: self._interrupted.set())
        print_formatted_text(welcome)

    def read(self, draft: str) -> str | None:
        warned = False
        while True:
            print_formatted_text()
            try:
                return self._session.prompt(default=draft)
            except EOFError:
                return None
            except KeyboardInterrupt:
                empty = not self._session.default_buffer.text
            if empty and warned:
                return None
            if empty:
                self.notice("要退出，请输入 stop，或再按一次 Ctrl+C。" if self._zh else
                            "To leave, type stop or press Ctrl+C once more.")  # fmt: skip
            draft, warned = "", empty

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        self._interrupted.clear()
        print_formatted_text()
        _print("bold", "ChatGLM：" if self._zh else "ChatGLM: ", end="")
        with self._keys_wait():
            try:
                yield self._interrupted.is_set
            finally:
                print_formatted_text()

    def show(self, text: str) -> None:
        _print("", text, end="")

    def notice(self, text: str) -> None:
        _print("ansibrightblack", text)

    def fail(self, text: str) -> None:
        _print("ansired", text)

    def clear(self) -> None:
        clear()
        print_formatted_text(self._welcome)

    @contextlib.contextmanager
    def _keys_wait(self) -> Iterator[None]:
        """What is typed or pasted while an answer comes is not echoed into it but waits for the next prompt."""
        output = self._session.output
        output.enable_bracketed_paste()
        output.flush()
        try:
            with _without_echo():
                yield
        finally:
            output.disable_bracketed_paste()
            output.flush()


def _print(style: str, text: str, end: str = "\n") -> None:
    """Control characters in ``text`` are shown and not carried out."""
    print_formatted_text(FormattedText([(style, text)]), end=end, flush=True)


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    if os.name == "nt":  # which echoes only what is being read
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[0] &= ~termios.ICRNL  # prompt_toolkit tells Enter from Ctrl+J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)  # ISIG stays: Ctrl+C is a signal
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    """Enter sends, unless the line ends in a backslash."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not searching among earlier questions

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    if os.name == "nt":
        # the end of input there, which prompt_toolkit would type as a character
        @keys.add("c-z", filter=typing & Condition(lambda: not get_app().current_buffer.text))
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=EOFError)

    return keys

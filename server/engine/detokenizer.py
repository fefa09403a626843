"""Token ids to text while they come: no half characters, no lost spaces, nothing taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.models.base import Tokenizer

_REPLACEMENT = "\ufffd"
# at most three bytes of a UTF-8 character can be waiting for the next one; each decodes to one replacement character
_MAX_INCOMPLETE = 3
# tokens decoded again and again, and how many of them stay as context when they have grown to this many
_WINDOW, _CONTEXT = 24, 4


class StreamingDetokenizer:
    """Decodes a growing answer through a short window of its latest tokens.

    A piece's text depends on its neighbours (the first piece of a text loses its leading space, bytes join to
    characters), so tokens cannot be decoded one by one. ``context`` are the last ids before the answer when it
    continues a text: the answer prefix. Without them the answer starts a text of its own.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._start(list(context)[-_CONTEXT:])

    def add(self, ids: Iterable[int]) -> str:
        """The text that the new ids complete; an unfinished character waits for its other bytes."""
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids)
        waiting = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_INCOMPLETE)
        certain = max(self._given, len(text) - waiting)
        new, self._given = text[self._given : certain], certain
        if not waiting and len(self._ids) > _WINDOW:
            self._start(self._ids[-_CONTEXT:])
        return new

    def flush(self) -> str:
        """What is left at the end, without the bytes of a character that never became whole."""
        return self._tokenizer.decode(self._ids)[self._given :].rstrip(_REPLACEMENT)

    def _start(self, context: list[int]) -> None:
        self._ids = context
        self._given = len(self._tokenizer.decode(context))

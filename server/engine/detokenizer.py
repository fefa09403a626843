"""Token ids to text while they come: no half characters, no lost spaces, nothing taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.models.base import Tokenizer

_REPLACEMENT = "\ufffd"
# a character has at most 4 bytes, one token each; more pending tokens than this are not UTF-8 at all
_MAX_PENDING = 8


class StreamingDetokenizer:
    """Decodes a growing answer by decoding a short window of it twice, with and without the new tokens.

    A piece's text depends on its neighbours (the first piece of a text loses its leading space, bytes join to
    characters), so tokens cannot be decoded one by one. ``context`` are the ids before the answer that it continues:
    the answer prefix; without them the answer starts a text of its own.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._window = 0  # where the decoded window begins
        self._done = len(self._ids)  # up to here the text was given out

    def add(self, ids: Iterable[int]) -> str:
        """The text that the new ids complete; an unfinished character waits for its other bytes."""
        self._ids.extend(ids)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._done <= _MAX_PENDING:
            return ""
        if text:
            self._window, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, without the bytes of a character that never became whole."""
        text = self._new_text().rstrip(_REPLACEMENT)
        self._window = self._done = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._window : self._done])
        return self._tokenizer.decode(self._ids[self._window :])[len(before) :]

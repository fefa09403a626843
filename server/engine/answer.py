"""The reader's side of a request: ids become the text of an answer, in the request's own thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator

from server.core import FinishReason, GenerationRequest, RequestOutput, TokenLogprob, ToolCall, Usage
from server.engine.detokenizer import StreamingDetokenizer
from server.engine.logprobs import readable
from server.engine.prompting import Prompt
from server.engine.sequence import Finish, Sequence
from server.models.base import Family, Tokenizer


class AnswerText:
    """Raw text in, showable text out: the family's post-processing, stop strings, the answer prefix in front.

    Stop strings are looked for in what is shown, not in a family's own marks or in tool calls. ``calls`` are the tool
    calls that have become certain so far.
    """

    def __init__(self, family: Family, tokenizer: Tokenizer, request: GenerationRequest, prompt: Prompt):
        self._family = family
        self._prefix = request.answer_prefix
        self._continues = prompt.continued
        context = prompt.ids if self._continues or self._prefix else ()
        self._detokenizer = StreamingDetokenizer(tokenizer, context)
        self._stop = request.params.stop
        self._tools = tuple(tool.name for tool in request.tools)
        self._raw = ""
        self._certain = 0  # characters of what is shown, less the prefix, before which no stop string begins
        self._given = 0  # characters of the answer given out so far
        self.calls: tuple[ToolCall, ...] = ()
        self.stopped = False

    def start(self) -> str:
        """The answer prefix, which is known before the first token."""
        return self._reveal(final=False)

    def add(self, token_id: int) -> str:
        """What became certain with this token; sets ``stopped`` when a stop string is complete."""
        self._raw += self._detokenizer.add([token_id])
        return self._reveal(final=False)

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        if not self.stopped:
            self._raw += self._detokenizer.flush()
        return self._reveal(final=True)

    def _reveal(self, *, final: bool) -> str:
        shown = self._shown(self._raw, final)
        if not self.stopped:
            self._certain = self._end_of_certain(shown, final)
        new = (self._prefix + shown[: self._certain])[self._given :]
        self._given += len(new)
        return new

    def _end_of_certain(self, shown: str, final: bool) -> int:
        """Where the first stop string begins, or could begin as long as more may come."""
        ends = [at for at in (shown.find(stop, self._certain) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return min(ends)
        if not final and self._stop:
            for at in range(self._certain, len(shown)):
                if any(stop.startswith(shown[at:]) for stop in self._stop):
                    return at
        return len(shown)

    def _shown(self, raw: str, final: bool) -> str:
        if self._continues:
            return raw
        continued = bool(self._prefix)
        if not self._tools:
            return self._family.display(raw, final=final, continued=continued)
        text, self.calls = self._family.display_calls(raw, self._tools, final=final, continued=continued)
        return text


class LocalRequestStream:
    """The RequestStream of a sequence (see ``core.RequestStream``)."""

    def __init__(self, sequence: Sequence, answer: AnswerText, tokenizer: Tokenizer):
        self.request_id = sequence.request_id
        self.prompt_ids = tuple(sequence.token_ids)
        self._sequence = sequence
        self._answer = answer
        self._tokenizer = tokenizer
        self._text = answer.start()
        self._ids: list[int] = []
        self._num_ids = self._num_calls = 0  # given out so far
        self._ended = False

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            if self._text or len(self._answer.calls) > self._num_calls:
                return self._output()
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._sequence.events.get(timeout=remaining)
            except queue.Empty:
                return None
            if isinstance(event, Finish):
                return self._end(event)
            self._ids.append(event)
            self._text = self._answer.add(event)
            if self._answer.stopped:
                self._sequence.finish(FinishReason.STOP)
                return self._end(Finish(FinishReason.STOP))
        return None

    def __iter__(self) -> Iterator[RequestOutput]:
        while (output := self.get()) is not None:
            yield output

    @property
    def prompt_text(self) -> str:
        return self._tokenizer.decode(self.prompt_ids)

    def close(self) -> None:
        self._sequence.finish(FinishReason.ABORT)

    def _end(self, finish: Finish) -> RequestOutput:
        self._ended = True
        self._text += self._answer.flush()
        usage = Usage(self._sequence.num_prompt, self._num_ids + len(self._ids), self._sequence.num_cached)
        return self._output(finish_reason=finish.reason, error=finish.error, usage=usage, end=self._end_token(finish))

    def _output(self, **last) -> RequestOutput:
        calls = self._answer.calls[self._num_calls :]
        prompt = self._prompt_logprobs() if not self._num_ids and (self._ids or last) else ()
        output = RequestOutput(self._text, tuple(self._ids), self._logprobs(), calls, prompt, **last)
        self._num_ids += len(self._ids)
        self._num_calls += len(calls)
        self._text, self._ids = "", []
        return output

    def _logprobs(self) -> tuple[TokenLogprob, ...]:
        if self._sequence.params.logprobs is None:
            return ()
        first = len(self.prompt_ids) + self._num_ids
        return tuple(readable(self._tokenizer, i, self._sequence.scores[at]) for at, i in enumerate(self._ids, first))

    def _end_token(self, finish: Finish) -> TokenLogprob | None:
        """The token that is not part of the answer; a stop string's tokens are."""
        found = self._sequence.scores.get(len(self.prompt_ids) + self._num_ids + len(self._ids))
        if found is None or finish.reason is not FinishReason.STOP or self._answer.stopped:
            return None
        return readable(self._tokenizer, found.token_id, found)

    def _prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those of a prompt that was read to its end."""
        scores, last = self._sequence.scores, len(self.prompt_ids) - 1
        if self._sequence.params.prompt_logprobs is None or (last > 0 and last not in scores):
            return ()
        return tuple(readable(self._tokenizer, i, scores.get(at)) for at, i in enumerate(self.prompt_ids))

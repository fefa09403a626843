"""Text completions: a prompt without a template, as text or as token ids."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from flask import Response
from pydantic import Field, PlainValidator, TypeAdapter

from server.api.dialect import Call
from server.api.dialects.openai.fields import SamplingFields, expected
from server.api.dialects.openai.reply import Kind, respond
from server.api.dialects.openai.shapes import TextLogprobs, finish_reason
from server.api.fields import Array, Text, WholeNumber
from server.api.streaming import Answer
from server.core import GenerationRequest, RequestOutput
from server.errors import BadRequest

MAX_ANSWERS = 2048  # to one request
MAX_SCORED = 2**19  # characters or ids of prompts: their log probabilities are some 200 times as large
MANY = Field(min_length=1, max_length=MAX_ANSWERS)

Ids = Annotated[Array[Annotated[WholeNumber, Field(ge=0)]], Field(min_length=1)]
Texts, IdLists = Annotated[Array[Text], MANY], Annotated[Array[Ids], MANY]
_TEXTS, _IDS, _ID_LISTS = TypeAdapter(Texts), TypeAdapter(Ids), TypeAdapter(IdLists)


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Every form of a prompt as a list of them."""
    if isinstance(value, str):
        return _TEXTS.validate_python([value])
    if not isinstance(value, list):
        raise expected("文本、token id 数组，或由它们组成的数组", "a text, token ids or an array of either")
    first = value[0] if value else ""
    if isinstance(first, str):
        return _TEXTS.validate_python(value)
    if isinstance(first, list):
        return _ID_LISTS.validate_python(value)
    return [_IDS.validate_python(value)]


Prompts = Annotated[
    list[str] | list[list[int]], PlainValidator(_prompts, json_schema_input_type=Text | Texts | Ids | IdLists)
]


class CompletionFields(SamplingFields):
    prompt: Prompts = Field(description="a text, token ids, or a list of either; special tokens are put before a text")
    max_tokens: WholeNumber = Field(16, ge=-1, description="tokens of the answer; 0 only reads the prompt, -1 no limit")
    echo: bool = Field(False, description="the prompt in front of the answer; with logprobs, those of its tokens too")
    logprobs: WholeNumber | None = Field(
        None, ge=0, le=5, description="log probabilities of the tokens, and of so many of the likeliest in each place"
    )
    best_of: WholeNumber | None = Field(None, ge=1, description="only equal to n: all answers are returned")
    suffix: Text = Field("", description="what comes behind the answer: not supported, must be empty")


def completions(call: Call, fields: CompletionFields) -> Response:
    """What comes after one or many prompts, whole or as a stream. Many prompts are worked through as room allows."""
    if fields.best_of not in (None, fields.n):
        raise BadRequest("best_of 只能等于 n。", "best_of can only be equal to n.", param="best_of")
    if fields.suffix:
        raise BadRequest(
            "不支持 suffix：模型只会往后写。", "suffix is not supported: the model only writes on.", param="suffix"
        )
    _check_size(fields)
    kind = Kind("cmpl", "text_completion", "text_completion", partial(_TextChoice, fields))
    return respond(call, fields, [_request(call, fields, prompt) for prompt in fields.prompt], kind)


def _check_size(fields: CompletionFields) -> None:
    answers, scored = len(fields.prompt) * fields.n, sum(map(len, fields.prompt)) * fields.n
    if answers > MAX_ANSWERS:
        raise BadRequest(
            f"这个请求要生成 {answers} 个回答，最多允许 {MAX_ANSWERS} 个。",
            f"This request is for {answers} answers; at most {MAX_ANSWERS} are allowed.",
            param="n",
        )
    if fields.echo and fields.logprobs is not None and scored > MAX_SCORED:
        raise BadRequest(
            f"带 echo 和 logprobs 时 prompt 合计（乘以 n）最多 {MAX_SCORED} 个字符或 token，收到 {scored} 个。请分批。",
            f"With echo and logprobs the prompts may have {MAX_SCORED} characters or token ids in all (times n), but "
            f"they have {scored}; send them in several requests.",
            param="prompt",
        )


def _request(call: Call, fields: CompletionFields, prompt: str | list[int]) -> GenerationRequest:
    as_text = isinstance(prompt, str)
    return GenerationRequest(
        prompt=prompt if as_text else None,
        prompt_ids=() if as_text else tuple(prompt),
        params=fields.sampling_params(
            max_tokens=fields.max_tokens,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.logprobs if fields.echo else None,
        ),
        client=call.client,
    )


class _TextChoice:
    """A ``reply.Choice``; chunks have the same shape as the whole."""

    def __init__(self, fields: CompletionFields, index: int, answer: Answer):
        self._fields = fields
        self._index = index
        self._stream = answer.stream
        self._prompt = fields.prompt[index // fields.n]
        self._logprobs: TextLogprobs | None = None  # from the first output on

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, output: RequestOutput) -> list[dict[str, Any]]:
        body = self.whole(output)
        wanted = body["text"] or body["finish_reason"] or body["logprobs"] or body.get("token_ids")
        return [body] if wanted else []

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        first = self._logprobs is None
        echo = self._begin(output) if first else ""
        prompt = {"prompt_token_ids": self._stream.prompt_ids} if first and self._fields.return_token_ids else {}
        ids = {"token_ids": output.token_ids} if self._fields.return_token_ids else {}
        return {
            "index": self._index,
            "text": echo + output.text,
            "logprobs": self._logprobs_body(output),
            "finish_reason": finish_reason(output),
            **ids,
            **prompt,
        }

    def _begin(self, output: RequestOutput) -> str:
        """The prompt's text if it is to be echoed; its tokens' texts may begin with a space that it has not."""
        if not self._fields.echo:
            self._logprobs = TextLogprobs()
            return ""
        tokens = b"".join(token.data for token in output.prompt_logprobs).decode("utf-8", "replace")
        text = self._prompt if isinstance(self._prompt, str) else self._stream.prompt_text
        self._logprobs = TextLogprobs(len(text) - len(tokens))
        return text

    def _logprobs_body(self, output: RequestOutput) -> dict[str, Any] | None:
        if self._fields.logprobs is None:
            return None
        end = (output.end,) if output.end else ()  # lm-evaluation-harness drops the last entry as the one not in echo
        tokens = (*output.prompt_logprobs, *output.logprobs, *end)
        return self._logprobs.body(tokens) if tokens else None

"""The fields that chat and text completions share, and what they mean for the engine."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError, PydanticKnownError

from server.api.fields import Fields, Number, Text, WholeNumber, texts
from server.core import SamplingParams

MAX_LEVELS = 64  # of nested objects and arrays
MAX_BIASES = 1024


def expected(zh: str, en: str) -> PydanticCustomError:
    """An error for validators: the field must be ``zh`` or ``en``; the sentence adds where and what was given."""
    return PydanticCustomError("expected", "{en}", {"zh": zh, "en": en})


def sentence(zh: str, en: str) -> PydanticCustomError:
    """An error for validators that says all but the place."""
    return PydanticCustomError("sentence", "{en}", {"zh": zh, "en": en})


def encodable(value: dict[str, Any]) -> dict[str, Any]:
    """Validates what a model is to read as JSON: no half of a surrogate pair, and not nested beyond reason."""
    if _is_deeper(value, MAX_LEVELS):
        raise sentence(f"嵌套超过 {MAX_LEVELS} 层。", f"it is nested more than {MAX_LEVELS} levels deep.")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticKnownError("string_unicode") from None
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children)


Stops = texts(most=32)


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:  # before its keys: each wrong one costs time
        limits = {"field_type": "Dictionary", "max_length": MAX_BIASES, "actual_length": len(biases)}
        raise PydanticKnownError("too_long", limits)
    return biases


LogitBias = Annotated[dict[WholeNumber, Annotated[Number, Field(ge=-100, le=100)]], BeforeValidator(_few)]


class StreamOptions(Fields):
    include_usage: bool = Field(False, description="one more chunk before [DONE], with the usage and no choices")


class SamplingFields(Fields):
    model: Text = Field("", description="any name is accepted; the answer names the model that really ran")
    stream: bool = Field(False, description="server-sent events with what is new, and data: [DONE] at the end")
    stream_options: StreamOptions = Field(StreamOptions(), description="what a stream holds beside the answer")
    max_length: WholeNumber | None = Field(
        None, ge=1, description="extension: tokens of prompt and answer; capped by the server's limit"
    )
    temperature: Number = Field(SamplingParams.temperature, ge=0, le=2, description="0 always takes the best token")
    top_p: Number = Field(
        SamplingParams.top_p, ge=0, le=1, description="nucleus sampling; 0 leaves only the best token, 1 is off"
    )
    top_k: WholeNumber = Field(
        SamplingParams.top_k, ge=-1, description="extension: sample from the k best tokens; 0 or -1 is off"
    )
    n: WholeNumber = Field(1, ge=1, le=128, description="how many answers; half of the server's slots work on them")
    stop: Stops = Field([], description="a text or texts that end the answer and are not part of it")
    seed: WholeNumber | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="same seed, same answer; of n answers, each has the next seed"
    )
    presence_penalty: Number = Field(0, ge=-2, le=2, description="above 0 avoids tokens that the answer has")
    frequency_penalty: Number = Field(0, ge=-2, le=2, description="the same for each time that the answer has them")
    repetition_penalty: Number = Field(
        1, gt=0, le=2, description="extension: above 1 avoids tokens that prompt or answer have"
    )
    logit_bias: LogitBias = Field(
        {},
        description=f"token id to what is added to its logit, from -100 to 100; at most {MAX_BIASES} of them",
        json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}, "maxProperties": MAX_BIASES},
    )
    return_token_ids: bool = Field(
        False, description="extension: token_ids and prompt_token_ids in each choice, as the model had them"
    )

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(filter(None, self.stop)),
            max_tokens=None if max_tokens == -1 else max_tokens,
            max_length=self.max_length,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

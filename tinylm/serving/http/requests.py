"""A request for completions as OpenAI's API has it, read and checked. Making the answers is `openai_api`'s business.

Fields of OpenAI's that are not there for this model are refused unless they change nothing; so are unknown ones.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from tinylm.sampling import MAX_SEED, SamplingParams

MAX_BODY_BYTES = 4 * 1024 * 1024  # what a gRPC message may have
MAX_ANSWERS = 16  # of one request: prompts times n
MAX_PROMPT_ITEMS = 65_536  # texts or token ids in all: more than any context holds
PRIVATE = {"prompt", "stop", "user"}  # what people wrote goes into no message, for messages are logged
# What OpenAI's API has and this one has not, with the value that asks for nothing.
UNSUPPORTED = {"best_of": 1, "suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0}


class TooLarge(ValueError):
    """A request of more bytes than are read."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `/v1/completions`, with OpenAI's defaults. A null field counts as absent, also within an object."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None  # None is the one that is served
    prompt: str | list[str] | list[int] | list[list[int]] = ""  # one or several: texts, or token ids
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)  # answers to each prompt
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []
    seed: int | None = None
    logprobs: int | None = None  # alternatives at each place of the answer
    echo: bool = False  # the prompt before the answer
    user: str | None = None  # accepted, and not kept
    # What OpenAI's API does not have: as in tinylm.v1.GenerateRequest. llama.cpp says repeat_penalty.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = Field(
        default=1.0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    timeout_ms: int = Field(default=0, ge=0, le=2**32 - 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def timeout_s(self) -> float | None:
        return self.timeout_ms / 1000 if self.timeout_ms else None

    def params(self, index: int) -> SamplingParams:
        """Of the answer of this index to a prompt: each has a seed of its own, the first the one that was given."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            seed=self.seed if self.seed is None or index == 0 else (self.seed + index) % (MAX_SEED + 1),
            logprobs=self.logprobs,
        )


def is_field(name: str) -> bool:
    """Whether a request has a field of this name, supported or not."""
    return name in CompletionRequest.model_fields or name in UNSUPPORTED


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises TooLarge; ValueError for one that says it is no JSON.

    What says nothing of the kind is refused too: any web page may have a browser send that to any address, and only
    for JSON does the browser ask first whether it may.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ValueError(f"content-type is {media_type!r}: it must be application/json")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise TooLarge(f"the request has {declared} bytes: it must have at most {MAX_BODY_BYTES}")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"the request has more than {MAX_BODY_BYTES} bytes, the limit")
        chunks.append(chunk)
    return b"".join(chunks)


def read_request(body: bytes) -> CompletionRequest:
    """Raises ValueError that begins with the field's name, where one field is wrong."""
    try:
        values = _without_nulls(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("the request is not a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if values.pop(name, neutral) != neutral:
            raise ValueError(f"{name} is not supported: leave it out")
    if (n_items := _count(values.get("prompt"))) > MAX_PROMPT_ITEMS:
        raise ValueError(f"prompt holds {n_items} texts or tokens: at most {MAX_PROMPT_ITEMS} are read")
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        raise ValueError(_message(error.errors(include_url=False)[0])) from None
    n_prompts = len(request.prompts)
    if not 1 <= n_prompts * request.n <= MAX_ANSWERS:
        raise ValueError(
            f"prompt has {n_prompts} prompts with {request.n} answers each: there must be 1 to {MAX_ANSWERS} answers"
        )
    if request.echo and request.logprobs is not None:
        raise ValueError("logprobs is not supported together with echo: those of the prompt are not computed")
    if request.stream_options is not None and not request.stream:
        raise ValueError("stream_options is only for a request with stream: true")
    return request


def _without_nulls(value: Any) -> Any:
    """Return the value without the fields of objects that are null, at any depth. Lists stay as they are."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}


def _count(prompt: object) -> int:
    """Texts and token ids in a prompt, as they came."""
    return sum(len(item) if isinstance(item, list) else 1 for item in prompt) if isinstance(prompt, list) else 1


def _message(error: Any) -> str:
    """Field, value and what is wrong with it; of what is private, not the value but its kind."""
    if not error["loc"] or (error["type"] == "extra_forbidden" and len(error["loc"]) == 1):  # a lone surrogate has none
        return f"{error['loc'][0][:64] if error['loc'] else 'a name that is not Unicode'} is no field of this API"
    name = str(error["loc"][0])
    value = f"of type {type(error['input']).__name__}" if name in PRIVATE else repr(error["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return f"{name} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"

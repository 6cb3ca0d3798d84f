"""Read and check a request of OpenAI's completions API. `tinylm.serving.http.requests` gets it from HTTP.

Unknown fields are refused. Fields that this model does not support are refused unless their value changes nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from tinylm.sampling import MAX_SEED, SamplingParams
from tinylm.system.json_text import parse_json

MAX_ANSWERS = 128  # of one request: its prompts times n, or times best_of
MAX_PROMPT_ITEMS = 65_536  # texts or token ids in total; a context holds far fewer
# Error messages omit these values, because they are logged.
PRIVATE = {"prompt", "stop", "user", "bad_words", "dry_sequence_breakers"}
# Unsupported fields of OpenAI's API and of vLLM's, with the value that has no effect.
UNSUPPORTED = {"suffix": "", "skip_special_tokens": True}
DEFAULTS = SamplingParams()


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False  # in an event after the last text
    continuous_usage_stats: bool = False  # in every event, of its answer so far, as vLLM has it
    include_obfuscation: bool = False  # pad the events, so that their sizes do not reveal the text


class SamplingFields(BaseModel):
    """The fields that choose tokens, with OpenAI's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # -1 means a random seed
    logit_bias: dict[str, float] = {}  # the keys are token ids
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Not in OpenAI's API: the same fields as in tinylm.v1.GenerateRequest. llama.cpp's name is repeat_penalty.
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = Field(
        default=1.0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    bad_words: list[str] = []
    dry_multiplier: float = DEFAULTS.dry_multiplier
    dry_base: float = DEFAULTS.dry_base
    dry_allowed_length: int = DEFAULTS.dry_allowed_length
    dry_penalty_last_n: int = DEFAULTS.dry_penalty_last_n
    dry_sequence_breakers: list[str] = list(DEFAULTS.dry_sequence_breakers)

    def settings(self, index: int = 0) -> dict[str, Any]:
        """Return the fields as arguments of `SamplingParams`, for answer `index` to a prompt.

        Its seed is the request's seed plus `index`. Raise ValueError for a wrong `logit_bias`.
        """
        same = {name: getattr(self, name) for name in SamplingFields.model_fields if name not in ("seed", "logit_bias")}
        return {**same, "seed": _seed(self.seed, index), "logit_bias": _biases(self.logit_bias)}


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`. A null field counts as absent, also inside an object."""

    model: str | None = None  # None means the served model
    prompt: str | list[str] | list[int] | list[list[int]] = ""  # one or several texts, or token ids
    max_tokens: int = 16
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)  # answers to each prompt
    best_of: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)  # generate so many, and return the n most likely
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] = []  # "" means none
    logprobs: int | None = None  # alternatives to report for each token
    echo: bool = False  # put the prompt before the answer
    user: str | None = None  # accepted and ignored
    timeout_ms: int = Field(default=0, ge=0, le=2**32 - 1)  # not in OpenAI's API

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def n_generated(self) -> int:
        """How many answers to generate to each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def timeout_s(self) -> float | None:
        return self.timeout_ms / 1000 if self.timeout_ms else None

    def params(self, index: int) -> SamplingParams:
        """Return the settings of answer `index` to a prompt. Its seed is the request's seed plus `index`."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop=() if self.stop == "" else tuple([self.stop] if isinstance(self.stop, str) else self.stop),
            logprobs=0 if self.logprobs is None and self.n_generated > self.n else self.logprobs,
            prompt_logprobs=self._prompt_logprobs,
            **self.settings(index),
        )

    @property
    def _prompt_logprobs(self) -> int | None:
        """With `echo`, the prompt has log-probabilities too, and the answer may be empty."""
        if not self.echo:
            return None
        return 0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs


def _seed(seed: int | None, index: int) -> int | None:
    """Return the seed of answer `index`. Each answer has another one, within the limit."""
    if seed is None or seed == -1:
        return None
    return seed if index == 0 else (seed + index) % (MAX_SEED + 1)


def _biases(logit_bias: dict[str, float]) -> dict[int, float]:
    """Return the biases with token ids as keys. Raise ValueError for other keys."""
    for key in logit_bias:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"logit_bias has the key {key[:64]!r}: it must be a token id")
    return {int(key): value for key, value in logit_bias.items()}


def is_field(name: str) -> bool:
    """Return whether the API has a field of this name, supported or not."""
    return name in CompletionRequest.model_fields or name in UNSUPPORTED


def read_request(body: bytes) -> CompletionRequest:
    """Return the checked request. Raise ValueError; if one field is wrong, the message begins with its name."""
    return check_request(parse_json(body, "the request"))


def check_request(values: Any) -> CompletionRequest:
    """Return the checked request for parsed JSON. Raise ValueError as `read_request` does."""
    try:
        values = _without_nulls(values)
    except RecursionError:  # Python's parser, which is in C, reads deeper brackets
        raise ValueError("the request is not JSON that can be read: its brackets are nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("the request is not a JSON object")
    for name, neutral in UNSUPPORTED.items():
        if values.pop(name, neutral) != neutral:
            raise ValueError(f"{name} is not supported: leave it out")
    if (n_items := _count(values.get("prompt"))) > MAX_PROMPT_ITEMS:
        raise ValueError(f"prompt has {n_items} texts or tokens: it must have at most {MAX_PROMPT_ITEMS}")
    try:
        request = CompletionRequest.model_validate(values)
    except ValidationError as error:
        raise ValueError(message_of(error)) from None
    n_prompts = len(request.prompts)
    if request.n_generated < request.n:
        raise ValueError(f"best_of is {request.best_of}: it must be at least n, {request.n}")
    if request.stream and request.n_generated > request.n:
        raise ValueError(f"best_of is {request.best_of}: with stream it must be n, {request.n}")
    if not 1 <= n_prompts * request.n_generated <= MAX_ANSWERS:
        raise ValueError(
            f"prompt has {n_prompts} prompts with {request.n_generated} answers each: "
            f"the total must be 1 to {MAX_ANSWERS}"
        )
    if request.stream_options is not None and not request.stream:
        raise ValueError("stream_options needs stream: true")
    return request


def _without_nulls(value: Any) -> Any:
    """Return the value without its null fields, at any depth of objects. Lists stay unchanged."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(item) for name, item in value.items() if item is not None}


def _count(prompt: object) -> int:
    """Return the number of texts or token ids in an unchecked prompt."""
    return sum(len(item) if isinstance(item, list) else 1 for item in prompt) if isinstance(prompt, list) else 1


def message_of(validation: ValidationError) -> str:
    """Return a message with the first wrong field, its value, and the error. Of a private field, it has the type."""
    error: Any = validation.errors(include_url=False)[0]
    if not error["loc"]:  # pydantic gives no location for a name with a lone surrogate
        return "a name that is not Unicode is not a field of this API"
    if error["type"] == "extra_forbidden" and all(isinstance(part, str) for part in error["loc"]):
        return f"{'.'.join(error['loc'])[:64]} is not a field of this API"
    name = str(error["loc"][0])
    value = f"of type {type(error['input']).__name__}" if name in PRIVATE else repr(error["input"])
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return f"{name} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"

"""The settings of one request, and the log-probabilities of one token. Clients import this, so it does without NumPy.

The kernels choose tokens by these settings. The engine decides when an answer ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_SEED = 2**63 - 1

# Why an answer ended. "stop": the model or a stop string; "length": max_tokens or the context.
FinishReason = Literal["stop", "length", "timeout", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. ValueError names the field, the value and the limit."""

    max_tokens: int = 64  # of the answer; prompt and answer share the context; 0 is allowed with prompt_logprobs
    temperature: float = 0.8  # 0 is greedy: it always takes the most likely token
    top_p: float = 0.95  # keep the most likely tokens that together have this probability; 1 keeps all
    top_k: int = 0  # keep this many of the most likely tokens; 0 keeps all
    min_p: float = 0.0  # keep the tokens with at least this share of the most likely token's probability
    repetition_penalty: float = 1.0  # above 1 makes tokens of prompt and answer less likely, but not the end
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    seed: int | None = None  # the same seed and settings give the same text; None means a random seed
    logprobs: int | None = None  # return log-probabilities of each token and of this many alternatives; None: of none
    prompt_logprobs: int | None = None  # the same for the prompt's tokens

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Iterable):
            raise ValueError(f"stop is {self.stop!r}: it must be a string or several")
        object.__setattr__(self, "stop", tuple(self.stop))
        self._whole("max_tokens", 1 if self.prompt_logprobs is None else 0, None)
        self._number("temperature", 0, 10)
        self._number("top_p", 0, 1, above=True)
        self._whole("top_k", 0, None)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0.01, 10)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} strings: at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                length = len(text) if isinstance(text, str) else type(text).__name__
                raise ValueError(f"stop holds a string of length {length}: it must be 1 to {MAX_STOP_CHARS} characters")
        if self.seed is not None:
            self._whole("seed", 0, MAX_SEED)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                self._whole(field, 0, MAX_LOGPROBS)

    def _whole(self, field: str, low: int, high: int | None) -> None:
        value, limit = getattr(self, field), f"at least {low}" if high is None else f"{low} to {high}"
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        if not fits or value < low or (high is not None and value > high):
            raise ValueError(f"{field} is {value!r}: it must be a whole number, {limit}")
        object.__setattr__(self, field, int(value))  # converts NumPy's numbers

    def _number(self, field: str, low: float, high: float, above: bool = False) -> None:
        value, limit = getattr(self, field), f"above {low} and at most {high}" if above else f"{low} to {high}"
        is_number = isinstance(value, (int, float, Real)) and not isinstance(value, bool)
        fits = is_number and low <= value <= high  # False for NaN
        if not fits or (above and value == low):
            raise ValueError(f"{field} is {value!r}: it must be a number, {limit}")
        if not isinstance(value, int):
            object.__setattr__(self, field, float(value))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before penalty, temperature and truncation."""

    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # (token, logprob) of the most likely tokens, in descending order

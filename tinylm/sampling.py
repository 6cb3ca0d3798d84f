"""The settings of one request, and the log-probabilities of one token. Clients import this, so it does without NumPy.

The kernels choose tokens by these settings. The engine decides when an answer ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 300
MAX_BAD_WORDS = 64
MAX_BREAKERS = 16
MAX_BREAKER_CHARS = 40
MAX_SEED = 2**63 - 1
MAX_INT32 = 2**31 - 1

# Why an answer ended. "stop": the model, a stop token or a stop string; "length": max_tokens or the context.
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
    ignore_eos: bool = False  # never choose the boundary, so that the model does not end the text itself
    min_tokens: int = 0  # the boundary, stop_token_ids and stop end the answer only after this many tokens
    stop_token_ids: tuple[int, ...] = ()  # these tokens end the answer like the boundary, and are not part of it
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token -> added to its logit
    presence_penalty: float = 0.0  # subtracted once from the logit of each token of the answer
    frequency_penalty: float = 0.0  # subtracted from the logit of each token as often as the answer holds it
    bad_words: tuple[str, ...] = ()  # never write the tokens of these words, with or without a space before them
    dry_multiplier: float = 0.0  # penalize tokens that extend a repetition (DRY, as in llama.cpp); 0 turns it off
    dry_base: float = 1.75  # the penalty is multiplier * base^(length of the repetition - allowed_length)
    dry_allowed_length: int = 2  # shorter repetitions have no penalty
    dry_penalty_last_n: int = -1  # search this many of the last tokens of prompt and answer; -1: all; 0: none
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")  # a repetition ends at these strings

    def __post_init__(self) -> None:
        self._whole("max_tokens", 1 if self.prompt_logprobs is None else 0, None)
        self._number("temperature", 0, 10)
        self._number("top_p", 0, 1, above=True)
        self._whole("top_k", 0, None)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0.01, 10)
        self._strings("stop", 0, MAX_STOP_STRINGS, MAX_STOP_CHARS)
        if self.seed is not None:
            self._whole("seed", 0, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._whole(name, 0, MAX_LOGPROBS)
        self._check_the_end()
        self._check_the_logits()

    def _check_the_end(self) -> None:
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}: it must be True or False")
        self._whole("min_tokens", 0, None)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}: it must be at most max_tokens, {self.max_tokens}")
        tokens = self.stop_token_ids
        if not isinstance(tokens, (tuple, Iterable)) or isinstance(tokens, (str, bytes)):
            raise ValueError(f"stop_token_ids is {tokens!r}: it must be a list of token ids")
        tokens = tuple(tokens)
        if len(tokens) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids has {len(tokens)} tokens: it must have 0 to {MAX_STOP_TOKENS}")
        ids = tuple(_whole("stop_token_ids", token, 0, MAX_INT32) for token in tokens)
        object.__setattr__(self, "stop_token_ids", ids)

    def _check_the_logits(self) -> None:
        if not isinstance(self.logit_bias, (dict, Mapping)):
            raise ValueError(f"logit_bias is {self.logit_bias!r}: it must map token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} tokens: it must have 0 to {MAX_LOGIT_BIASES}")
        biases = {}
        for token, value in self.logit_bias.items():
            token = _whole("logit_bias token", token, 0, MAX_INT32)
            biases[token] = float(_number(f"logit_bias of token {token}", value, -100, 100))
        object.__setattr__(self, "logit_bias", biases)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        self._strings("bad_words", 0, MAX_BAD_WORDS, MAX_STOP_CHARS)
        self._number("dry_multiplier", 0, 100)
        self._number("dry_base", 1, 100)
        self._whole("dry_allowed_length", 0, MAX_INT32)
        self._whole("dry_penalty_last_n", -1, MAX_INT32)
        self._strings("dry_sequence_breakers", 1, MAX_BREAKERS, MAX_BREAKER_CHARS)

    @property
    def uses_dry(self) -> bool:
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    def _whole(self, name: str, low: int, high: int | None) -> None:
        object.__setattr__(self, name, _whole(name, getattr(self, name), low, high))

    def _number(self, name: str, low: float, high: float, above: bool = False) -> None:
        object.__setattr__(self, name, _number(name, getattr(self, name), low, high, above))

    def _strings(self, name: str, least: int, most: int, most_chars: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, (tuple, Iterable)):
            raise ValueError(f"{name} is {value!r}: it must be a string or several")
        strings = (value,) if isinstance(value, str) else tuple(value)
        if not least <= len(strings) <= most:
            raise ValueError(f"{name} has {len(strings)} strings: it must have {least} to {most}")
        for text in strings:
            if not isinstance(text, str) or not 1 <= len(text) <= most_chars:
                length = len(text) if isinstance(text, str) else type(text).__name__
                raise ValueError(f"{name} holds a string of length {length}: it must be 1 to {most_chars} characters")
        object.__setattr__(self, name, strings)


def _whole(name: str, value: Any, low: int, high: int | None) -> int:
    """Return a whole number, also NumPy's, as Python's. Raise ValueError if it is not one from low to high."""
    fits = isinstance(value, (int, Integral)) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} is {value!r}: it must be a whole number, {limit}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    """Return a number, also NumPy's, as Python's. Raise ValueError if it is not one from low to high.

    above: the number must be larger than `low`.
    """
    is_number = isinstance(value, (int, float, Real)) and not isinstance(value, bool)
    fits = is_number and low <= value <= high  # False for NaN
    if not fits or (above and value == low):
        limit = f"above {low} and at most {high}" if above else f"{low} to {high}"
        raise ValueError(f"{name} is {value!r}: it must be a number, {limit}")
    return value if isinstance(value, int) else float(value)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before penalties, biases, temperature and truncation."""

    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # (token, logprob) of the most likely tokens, in descending order

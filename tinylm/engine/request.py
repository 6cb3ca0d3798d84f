"""A request of the engine, the immutable snapshots of its progress, and the checks of a prompt."""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np

from tinylm.engine.logit_changes import LogitChanges
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Progress:
    """What a request had at one moment. Times are `time.monotonic()` seconds. Any thread may read it.

    A later snapshot of the same request holds the tokens of all earlier ones.
    """

    n_prompt_tokens: int  # with the boundary
    n_reused: int  # how many of these were in the cache
    tokens: tuple[int, ...]  # the answer so far, without the token that ends it
    logprobs: tuple[TokenLogprobs, ...]  # one per token, if the request asks for them
    prompt_logprobs: tuple[TokenLogprobs, ...]  # one per token of the prompt except the first, if it asks for them
    finish_reason: FinishReason | None  # None while the request waits or runs
    submitted_at: float
    admitted_at: float | None
    first_token_at: float | None
    finished_at: float | None
    ending: tuple[int, TokenLogprobs] | None = None  # the token that ended the answer, if it asks for `logprobs`
    number: int = 0  # in the order in which requests got their slots, from 1; 0 before that


@dataclass(eq=False, slots=True)
class Request:
    """One request: its prompt, its answer so far, and its state. Times are `time.monotonic()` seconds.

    Every step changes it, so only the thread that steps the engine may read it, between two steps. Other threads get
    a `Progress`.
    """

    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    uniforms: list[float]  # one random number for each token that the answer can have
    ends: frozenset[int]  # the tokens that end the answer: the boundary and stop_token_ids
    changes: LogitChanges | None = None  # None: the logits stay as they are
    priority: int = 0  # 0 or more; a waiting request with a higher priority gets a slot first
    n_overtaken: int = 0  # how many requests with a higher priority went ahead of it in the queue
    tokens: list[int] = field(default_factory=list)  # the answer, without the token that ends it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, if the request asks for them
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens except the first
    ending: tuple[int, TokenLogprobs] | None = None  # the token that ended the answer, if it asks for `logprobs`
    finish_reason: FinishReason | None = None
    number: int = 0  # in the order in which requests got their slots, from 1; 0 before that
    slot: int | None = None  # the slot that the request has; after its end, the slot that it had
    n_cached: int = 0  # how many of its tokens have their keys and values in the slot
    n_reused: int = 0  # how many tokens of the prompt were in the cache when it was admitted
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def is_full(self) -> bool:
        """Whether the answer has reached `max_tokens` or the end of the context."""
        return len(self.tokens) >= len(self.uniforms)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the log-probabilities of some of the prompt's tokens are still missing."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    def next_ids(self, count: int) -> list[int]:
        """Return the `count` tokens after those cached."""
        begin = self.n_cached - len(self.prompt)
        if begin >= 0:
            return self.tokens[begin : begin + count]
        head = self.prompt[self.n_cached : self.n_cached + count]
        return head + self.tokens[: count - len(head)]

    def progress(self) -> Progress:
        """Return a snapshot."""
        return Progress(
            n_prompt_tokens=len(self.prompt),
            n_reused=self.n_reused,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=tuple(self.prompt_logprobs),
            finish_reason=self.finish_reason,
            submitted_at=self.submitted_at,
            admitted_at=self.admitted_at,
            first_token_at=self.first_token_at,
            finished_at=self.finished_at,
            ending=self.ending,
            number=self.number,
        )


def mark_seen(seen: np.ndarray, ids: list[int], boundary_id: int) -> None:
    """Mark in `seen` (vocab,) bool the tokens that the repetition penalty applies to: `ids` without the boundary.

    Every prompt has the boundary, so a penalty on it would delay the end.
    """
    seen[:] = False
    seen[ids] = True
    seen[boundary_id] = False


def whole_ids(ids: Iterable[SupportsIndex]) -> list[int]:
    """Return token ids, also NumPy's, as Python integers. Raise ValueError for an id that is not a whole number."""
    whole = []
    for token in ids:
        try:
            whole.append(operator.index(token))
        except TypeError:
            raise ValueError(f"the prompt holds {token!r}: token ids are whole numbers") from None
    return whole


def check_length(n_tokens: int, context: int, max_tokens: int = 1) -> None:
    """Raise ValueError unless a prompt of `n_tokens` has a token and leaves room for an answer in the context.

    max_tokens: of the answer. One that is empty needs no room.
    """
    if not n_tokens:
        raise ValueError("the prompt has no tokens: it must have at least 1")
    if n_tokens > context and not max_tokens:
        raise ValueError(f"prompt has {n_tokens} tokens: it must have at most {context}, the context")
    if n_tokens >= context and max_tokens:
        raise ValueError(
            f"prompt has {n_tokens} tokens: it must have at most {context - 1}, "
            f"since prompt and answer share a context of {context}"
        )


def check_ids(ids: Collection[int], vocab_size: int, name: str = "the prompt") -> None:
    """Raise ValueError unless all ids are tokens of the vocabulary. name: what holds the ids."""
    if not all(0 <= token < vocab_size for token in ids):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(f"{name} holds token {wrong}: tokens are 0 to {vocab_size - 1}")

"""Continuous batching: which sequences' tokens go through the model in a step, and what becomes of each result.

Synchronous and single-threaded: whoever holds an engine calls `step` until nothing is left. Token ids in, token ids
out; text is `tinylm.llm`'s business, threads and event loops are `tinylm.async_engine`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tinylm.kv_cache import KVCache
from tinylm.model import Chunk, Model
from tinylm.sampling import SamplingParams, TokenLogprobs, sample, token_logprobs

FinishReason = Literal["stop", "length", "timeout", "cancelled"]


class EngineFull(RuntimeError):
    """All slots are taken and the queue before them is full: try again later."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way: its tokens so far and where it stands. Times are `time.monotonic()` seconds."""

    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    rng: np.random.Generator
    seen: np.ndarray  # (vocab,) bool: tokens of the prompt and the answer, for the repetition penalty
    tokens: list[int] = field(default_factory=list)  # of the answer, without the boundary that ends it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if asked for
    finish_reason: FinishReason | None = None
    slot: int | None = None
    n_cached: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def next_ids(self, count: int) -> list[int]:
        """The `count` tokens after those cached."""
        begin = self.n_cached - len(self.prompt)
        if begin >= 0:
            return self.tokens[begin : begin + count]
        head = self.prompt[self.n_cached : self.n_cached + count]
        return head + self.tokens[: count - len(head)]


class Engine:
    """Runs up to `n_slots` sequences at once, further ones waiting their turn in the order they came."""

    def __init__(self, model: Model, n_slots: int = 16, max_waiting: int = 256, prefill_tokens: int = 64) -> None:
        """prefill_tokens: the most prompt tokens a step takes while others are decoding, so that they don't stall."""
        for name, value, least in (
            ("n_slots", n_slots, 1),
            ("max_waiting", max_waiting, 0),
            ("prefill_tokens", prefill_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        self.model = model
        self.config = model.config
        self.n_slots = n_slots
        self._cache = KVCache(model.config, n_slots)
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._free_slots = list(range(n_slots))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order they were admitted

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def submit(self, prompt: SequenceOf[int], params: SamplingParams, timeout_s: float | None = None) -> Sequence:
        """Queue a prompt of token ids, its boundary included.

        Raises ValueError when the prompt is empty, holds an unknown id or leaves no room to answer, EngineFull when
        the queue is full. The sequence's own fields tell how it goes on.
        """
        prompt = list(prompt)
        check_prompt(prompt, self.config.vocab_size, self.config.context)
        if len(self._waiting) >= self._max_waiting + len(self._free_slots):
            raise EngineFull(
                f"{self.n_running} requests are running and {self.n_waiting} waiting, the limit: try later"
            )
        seen = np.zeros(self.config.vocab_size, bool)
        seen[prompt] = True
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        sequence = Sequence(prompt, params, deadline, np.random.default_rng(params.seed), seen)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now, its slot free for the next step; without effect on one that has ended."""
        if sequence.finish_reason is None:
            self._finish(sequence, reason)

    def step(self) -> list[Sequence]:
        """Admit what fits, put one batch through the model, sample. Returns the sequences that gained or ended."""
        ended = self._expire()
        while self._waiting and self._free_slots:
            sequence = self._waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.admitted_at = time.monotonic()
            self._running.append(sequence)
        batch = self._batch()
        if not batch:
            return ended
        ids: list[int] = []
        chunks: list[Chunk] = []
        sampled: list[Sequence] = []
        rows: list[int] = []
        for sequence, count in batch:
            assert sequence.slot is not None  # running sequences have one
            ids += sequence.next_ids(count)
            chunks.append(Chunk(sequence.slot, sequence.n_cached, count))
            if sequence.n_cached + count == sequence.n_tokens:
                sampled.append(sequence)
                rows.append(len(ids) - 1)
        logits = self.model.forward(np.array(ids), chunks, self._cache, np.array(rows, int))
        for sequence, count in batch:  # after the pass: one that was interrupted is made again
            sequence.n_cached += count
        for sequence, scores in zip(sampled, logits, strict=True):
            self._append(sequence, scores)
        return ended + sampled

    def _expire(self) -> list[Sequence]:
        now = time.monotonic()
        late = [s for s in (*self._running, *self._waiting) if s.deadline is not None and s.deadline <= now]
        for sequence in late:
            self._finish(sequence, "timeout")
        return late

    def _batch(self) -> list[tuple[Sequence, int]]:
        """Running sequences and how many tokens of each go in: one of those decoding, a share of those in prefill."""
        decoding = [s for s in self._running if s.n_tokens - s.n_cached == 1]
        batch = [(sequence, 1) for sequence in decoding]
        budget = self._prefill_tokens if decoding else self.config.context
        for sequence in self._running:
            pending = sequence.n_tokens - sequence.n_cached
            if pending > 1 and budget > 0:
                count = min(pending, budget)
                budget -= count
                batch.append((sequence, count))
        return batch

    def _append(self, sequence: Sequence, logits: np.ndarray) -> None:
        token = sample(logits, sequence.params, sequence.seen, sequence.rng)
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        if token == self.config.boundary_id:
            self._finish(sequence, "stop")
            return
        if sequence.params.logprobs is not None:  # before its token, so that no other thread sees the token alone
            sequence.logprobs.append(token_logprobs(logits, token, sequence.params.logprobs))
        sequence.tokens.append(token)
        sequence.seen[token] = True
        if len(sequence.tokens) >= sequence.params.max_tokens or sequence.n_tokens >= self.config.context:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        sequence.finished_at = time.monotonic()
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._free_slots.append(sequence.slot)
            sequence.slot = None


def check_prompt(prompt: SequenceOf[int], vocab_size: int, context: int) -> None:
    """Raise ValueError unless the ids are tokens of the vocabulary and leave room for one more in the context."""
    if not prompt:
        raise ValueError("the prompt has no tokens: it must have at least 1")
    if not all(0 <= token < vocab_size for token in prompt):
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(f"the prompt holds token {wrong}: tokens are 0 to {vocab_size - 1}")
    if len(prompt) >= context:
        raise ValueError(
            f"prompt has {len(prompt)} tokens: it must have at most {context - 1}, "
            f"since prompt and answer share a context of {context}"
        )

"""Continuous batching: decide which tokens each step runs through the model, and give every sequence its new token.

A slot keeps the keys and values of its last sequence until it gets another one, so a prompt that begins like an earlier
prompt reuses that prefix. The engine is synchronous: its owner calls `step` until nothing is left. It takes and returns
token ids. `tinylm.llm` turns them into text; `tinylm.async_engine` runs an engine for an event loop.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np

from tinylm.logprobs import token_logprobs
from tinylm.model import Model, ModelRunner
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs
from tinylm.stats import EngineStats

LEAST_TO_COPY = 16  # computing a shorter prefix again is faster than copying it from another slot


class EngineFull(RuntimeError):
    """All slots are in use and the queue is full: try again later."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request: its prompt, its answer so far, and its state. Times are `time.monotonic()` seconds."""

    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    uniforms: np.ndarray  # one random number for each token that the answer can have
    tokens: list[int] = field(default_factory=list)  # the answer, without the boundary that ends it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, if the request asks for them
    finish_reason: FinishReason | None = None
    slot: int | None = None  # the slot that the sequence has; after its end, the slot that it had
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

    def next_ids(self, count: int) -> list[int]:
        """Return the `count` tokens after those cached."""
        begin = self.n_cached - len(self.prompt)
        if begin >= 0:
            return self.tokens[begin : begin + count]
        head = self.prompt[self.n_cached : self.n_cached + count]
        return head + self.tokens[: count - len(head)]


class Engine:
    """Runs up to `n_slots` sequences at once. Further ones wait and get a slot in the order they came.

    One thread at a time may call `step`, or add a sequence that has a deadline. Any thread may call everything else at
    any time, also during a step. An exception in `step`, such as a KeyboardInterrupt, loses nothing: the next step
    computes again what the interrupted one left undone.
    """

    def __init__(self, model: Model, n_slots: int = 16, max_waiting: int = 256, prefill_tokens: int = 64) -> None:
        """prefill_tokens: the most prompt tokens in a step while other sequences decode, so that these don't stall."""
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
        n_tokens = max(model.config.context, n_slots + prefill_tokens)
        self._runner = ModelRunner(model, n_slots, n_tokens=n_tokens, n_rows=n_slots)
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        # In the order they came. The first n_slots have the slots. Other threads append and remove during a step, so
        # this list is only ever changed by single list operations.
        self._unfinished: list[Sequence] = []
        self._cached: list[Sequence | None] = [None] * n_slots  # whose keys and values each slot holds
        self._in_step = False  # between steps, True means that an exception ended the last one
        self._next_deadline = float("inf")  # no sequence has an earlier one
        self.stats = EngineStats()
        self._stepped_at = time.monotonic()  # when the last step ended

    @property
    def cache_bytes(self) -> int:
        """Return the size of the KV cache in bytes."""
        return self._runner.cache_bytes

    @property
    def n_running(self) -> int:
        return sum(sequence.slot is not None for sequence in self._unfinished[: self.n_slots])

    @property
    def n_waiting(self) -> int:
        return len(self._unfinished) - self.n_running

    @property
    def kv_usage(self) -> float:
        """Return the share of the KV cache's positions (n_slots times the context) that running sequences use."""
        n_cached = sum(sequence.n_cached for sequence in self._unfinished[: self.n_slots])
        return n_cached / (self.n_slots * self.config.context)

    @property
    def has_work(self) -> bool:
        return bool(self._unfinished)

    def check_room(self, n_coming: int = 0) -> None:
        """Raise EngineFull if the engine would refuse another request after `n_coming` more."""
        if len(self._unfinished) + n_coming >= self.n_slots + self._max_waiting:
            raise EngineFull(
                f"{self.n_running} requests are running and {self.n_waiting} waiting, the limit: try later"
            )

    def request(self, prompt: SequenceOf[int], params: SamplingParams, timeout_s: float | None = None) -> Sequence:
        """Return the sequence of a prompt of token ids (with its boundary). `add` queues it.

        Raise ValueError if the prompt is empty, contains an unknown id or leaves no room in the context for an answer.
        """
        check_length(len(prompt), self.config.context)
        prompt = whole_ids(prompt)
        check_ids(prompt, self.config.vocab_size)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        max_tokens = min(params.max_tokens, self.config.context - len(prompt))
        return Sequence(prompt, params, deadline, np.random.default_rng(params.seed).random(max_tokens))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `request` returned. Raise EngineFull if the queue is full."""
        self.check_room()
        if sequence.deadline is not None:
            self._next_deadline = min(self._next_deadline, sequence.deadline)
        self._unfinished.append(sequence)

    def submit(self, prompt: SequenceOf[int], params: SamplingParams, timeout_s: float | None = None) -> Sequence:
        """Queue a prompt and return its sequence, whose fields show the progress. Raise as `request` and `add` do."""
        sequence = self.request(prompt, params, timeout_s)
        self.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now. The next step can use its slot. No effect on a sequence that has ended."""
        self._finish(sequence, reason)

    def step(self) -> list[Sequence]:
        """Admit what fits, run one batch through the model, sample. Return the sequences that gained a token or ended.

        After an exception, that list is lost: look at the sequences instead.
        """
        if self._in_step:
            self._recover()
        self._in_step = True
        began_at = time.monotonic()
        changed = self._expire()
        if running := self._admitted():
            changed += self._run(running, began_at)
        self._in_step = False
        return changed

    def _recover(self) -> None:
        """Rebuild the state after an interrupted step, from the sequences' tokens alone.

        Trusts nothing in the KV cache: every unfinished sequence waits for a slot again, and keeps its tokens.
        """
        self._cached = [None] * self.n_slots
        self._next_deadline = 0.0
        for sequence in self._unfinished.copy():
            sequence.slot, sequence.n_cached = None, 0
            del sequence.logprobs[len(sequence.tokens) :]
            if sequence.is_full or sequence.finish_reason is not None:
                self._finish(sequence, "length")

    def _run(self, running: list[Sequence], began_at: float) -> list[Sequence]:
        """Run one batch of tokens of these sequences through the model. Return the sequences that it gave a token."""
        parts = self._parts(running)
        sampled = self._fill_batch(parts)
        batch = self._runner.batch
        self._runner.step(sum(count for _, count in parts), len(sampled))
        for sequence, count in parts:
            sequence.n_cached += count
        n_later = sum(
            self._append(sequence, token, batch.logits[row, : self.config.vocab_size])
            for row, (sequence, token) in enumerate(zip(sampled, batch.chosen[: len(sampled)].tolist(), strict=True))
        )
        self._count_step(began_at, len(sampled), n_later)
        return sampled

    def _count_step(self, began_at: float, n_sampled: int, n_later: int) -> None:
        """n_later: how many of the tokens were not the first of their answer, and so followed one of the last step."""
        now = time.monotonic()
        self.stats.step_s.observe(now - began_at)
        if n_sampled:
            self.stats.batch_size.observe(n_sampled)
        if n_later:
            self.stats.inter_token_s.observe(now - self._stepped_at, n_later)
        self._stepped_at = now

    def _expire(self) -> list[Sequence]:
        """End the sequences whose deadline has passed, and return them."""
        now = time.monotonic()
        if now < self._next_deadline:
            return []
        with_deadline = [(s.deadline, s) for s in self._unfinished.copy() if s.deadline is not None]
        late = [s for deadline, s in with_deadline if deadline <= now]
        for sequence in late:
            self._finish(sequence, "timeout")
        self._next_deadline = min((deadline for deadline, _ in with_deadline if deadline > now), default=float("inf"))
        return late

    def _admitted(self) -> list[Sequence]:
        """Give a slot to each of the first n_slots sequences that has none. Return all of them."""
        first = self._unfinished[: self.n_slots]
        for sequence in first:
            if sequence.slot is None:
                taken = {other.slot for other in first}
                self._admit(sequence, [slot for slot in range(self.n_slots) if slot not in taken])
        return first

    def _admit(self, sequence: Sequence, free: list[int]) -> None:
        """Give a sequence one of the free slots, with as much of its tokens as any slot holds."""
        ids = sequence.prompt + sequence.tokens  # it has tokens if it ran before an interrupted step
        cached = [[] if s is None else (s.prompt + s.tokens)[: s.n_cached] for s in self._cached]
        slot, source, n_cached = choose_slot(ids, cached, sorted(free, key=self._unused_since))
        if source != slot:
            self._runner.copy_prefix(source, slot, n_cached)
        self._cached[slot] = sequence
        sequence.slot, sequence.n_cached = slot, n_cached
        batch = self._runner.batch
        batch.set_params(slot, sequence.params)
        batch.seen[slot] = False
        batch.seen[slot, ids] = True
        batch.seen[slot, self.config.boundary_id] = False  # every prompt begins with it, and the penalty is for text
        if sequence.admitted_at is None:
            sequence.admitted_at = time.monotonic()
            sequence.n_reused = n_cached
            self.stats.n_prompt_tokens += len(sequence.prompt)
            self.stats.n_reused_tokens += n_cached

    def _unused_since(self, slot: int) -> float:
        sequence = self._cached[slot]
        return 0.0 if sequence is None else sequence.finished_at or 0.0

    def _parts(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Return how many tokens of which sequences to run: one of each that decodes, a share of each in prefill."""
        parts = [(s, 1) for s in running if s.n_tokens - s.n_cached == 1]
        if len(parts) == len(running):
            return parts
        budget = self._prefill_tokens if parts else self.config.context
        for sequence in running:
            pending = sequence.n_tokens - sequence.n_cached
            if pending > 1 and budget > 0:
                count = min(pending, budget)
                budget -= count
                parts.append((sequence, count))
        return parts

    def _fill_batch(self, parts: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Write the parts' tokens into the batch. Return the sequences that get a token from it, one per row."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        sampled: list[Sequence] = []
        for sequence, count in parts:
            ids += sequence.next_ids(count)
            slots += [sequence.slot] * count  # type: ignore[list-item]  # a running sequence has a slot
            positions += range(sequence.n_cached, sequence.n_cached + count)
            if sequence.n_cached + count == sequence.n_tokens:
                rows.append(len(ids) - 1)
                sampled.append(sequence)
        batch = self._runner.batch
        batch.ids[: len(ids)] = ids
        batch.slots[: len(ids)] = slots
        batch.positions[: len(ids)] = positions
        batch.rows[: len(rows)] = rows
        batch.uniforms[: len(rows)] = [sequence.uniforms.item(len(sequence.tokens)) for sequence in sampled]
        return sampled

    def _append(self, sequence: Sequence, token: int, logits: np.ndarray) -> bool:
        """Give a sequence its new token. Return whether its answer now has a token that follows another."""
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        if token == self.config.boundary_id:
            self._finish(sequence, "stop")
            return False
        if sequence.params.logprobs is not None:  # before its token, so that no other thread sees the token alone
            sequence.logprobs.append(token_logprobs(logits, token, sequence.params.logprobs))
        sequence.tokens.append(token)
        self._runner.batch.seen[sequence.slot, token] = True
        if sequence.is_full:
            self._finish(sequence, "length")
        return len(sequence.tokens) > 1

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Record the end of a sequence and remove it. Calling it again, also after an interrupted call, is harmless."""
        if sequence.finish_reason is None:
            sequence.finished_at = time.monotonic()
            sequence.finish_reason = reason
        with suppress(ValueError):  # it has been removed
            self._unfinished.remove(sequence)


def choose_slot(ids: list[int], cached: list[list[int]], free: list[int]) -> tuple[int, int, int]:
    """Choose a free slot for a sequence. Return it, the slot whose prefix to use, and the length of that prefix.

    cached: the tokens that each slot holds. free: the free slots, the longest unused first.
    ([1, 2, 3], [[1, 9], [1, 2]], [0, 1]) -> (1, 1, 2)
    """
    shared = [_common_prefix(ids, tokens) for tokens in cached]
    best = max(free, key=shared.__getitem__)
    source = max(range(len(cached)), key=shared.__getitem__)
    if shared[source] >= shared[best] + LEAST_TO_COPY:
        return free[0], source, shared[source]
    return best, best, shared[best]


def _common_prefix(ids: list[int], cached: list[int]) -> int:
    """Return the length of the common prefix without the last of `ids`: the model must compute what follows that."""
    limit = min(len(ids) - 1, len(cached))
    return next((i for i in range(limit) if ids[i] != cached[i]), limit)


def whole_ids(ids: Iterable[SupportsIndex]) -> list[int]:
    """Token ids, NumPy's too, as Python's int; raises ValueError naming one that is no whole number."""
    whole = []
    for token in ids:
        try:
            whole.append(operator.index(token))
        except TypeError:
            raise ValueError(f"the prompt holds {token!r}: token ids are whole numbers") from None
    return whole


def check_length(n_tokens: int, context: int) -> None:
    """Raise ValueError unless a prompt of so many tokens has one, and leaves room for one more in the context."""
    if not n_tokens:
        raise ValueError("the prompt has no tokens: it must have at least 1")
    if n_tokens >= context:
        raise ValueError(
            f"prompt has {n_tokens} tokens: it must have at most {context - 1}, "
            f"since prompt and answer share a context of {context}"
        )


def check_ids(prompt: SequenceOf[int], vocab_size: int) -> None:
    """Raise ValueError unless these are tokens of the vocabulary."""
    if not all(0 <= token < vocab_size for token in prompt):
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise ValueError(f"the prompt holds token {wrong}: tokens are 0 to {vocab_size - 1}")

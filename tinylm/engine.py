"""Continuous batching: which sequences' tokens go through the model in a step, and what becomes of each result.

A slot keeps the keys and values of the sequence that left it until another comes: a prompt that begins like an earlier
one is not read again so far. Synchronous and single-threaded: whoever holds an engine calls `step` until nothing is
left. Token ids in, token ids out; text is `tinylm.llm`'s business, threads and event loops are `tinylm.async_engine`'s.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np

from tinylm.logprobs import token_logprobs
from tinylm.model import Model, ModelRunner
from tinylm.sampling import FinishReason, SamplingParams, TokenLogprobs
from tinylm.stats import EngineStats

LEAST_TO_COPY = 16  # tokens of a prefix that another slot holds: fewer are sooner computed again


class EngineFull(RuntimeError):
    """All slots are taken and the queue before them is full: try again later."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way: its tokens so far and where it stands. Times are `time.monotonic()` seconds."""

    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    rng: np.random.Generator
    uniform: float = 0.0  # the random number that the next token is drawn with
    tokens: list[int] = field(default_factory=list)  # of the answer, without the boundary that ends it
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one a token, if asked for
    finish_reason: FinishReason | None = None
    slot: int | None = None
    n_cached: int = 0
    n_reused: int = 0  # tokens of the prompt whose keys and values were there already
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
        n_tokens = max(model.config.context, n_slots + prefill_tokens)
        self._runner = ModelRunner(model, n_slots, n_tokens=n_tokens, n_rows=n_slots)
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._free_slots = deque(range(n_slots))  # the longest free first
        self._cached: list[list[int]] = [[] for _ in range(n_slots)]  # the tokens whose keys and values a slot holds
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order they were admitted
        self._n_unfinished = 0  # running and waiting, and those between the two: what other threads may ask for
        self._next_deadline = float("inf")  # no sequence has an earlier one
        self.stats = EngineStats()
        self._stepped_at = time.monotonic()  # when the last step ended

    @property
    def cache_bytes(self) -> int:
        """What the KV cache holds when all slots are full."""
        return self._runner.cache_bytes

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache's positions, n_slots times the context, that running sequences hold: 0 to 1."""
        running = self._running.copy()  # another thread may ask in the middle of a step
        return sum(sequence.n_cached for sequence in running) / (self.n_slots * self.config.context)

    @property
    def has_work(self) -> bool:
        return self._n_unfinished > 0

    def check_room(self, n_coming: int = 0) -> None:
        """Raise EngineFull when another request would be refused, after `n_coming` more. Any thread may ask."""
        if self._n_unfinished + n_coming >= self.n_slots + self._max_waiting:
            raise EngineFull(
                f"{self.n_running} requests are running and {self.n_waiting} waiting, the limit: try later"
            )

    def submit(self, prompt: SequenceOf[int], params: SamplingParams, timeout_s: float | None = None) -> Sequence:
        """Queue a prompt of token ids, its boundary included.

        Raises ValueError when the prompt is empty, holds an unknown id or leaves no room to answer, EngineFull when
        the queue is full. The sequence's own fields tell how it goes on.
        """
        check_length(len(prompt), self.config.context)
        prompt = whole_ids(prompt)
        check_ids(prompt, self.config.vocab_size)
        self.check_room()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if deadline is not None:
            self._next_deadline = min(self._next_deadline, deadline)
        sequence = Sequence(prompt, params, deadline, np.random.default_rng(params.seed))
        sequence.uniform = sequence.rng.random()
        self._waiting.append(sequence)
        self._n_unfinished += 1
        return sequence

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence now, its slot free for the next step; without effect on one that has ended."""
        if sequence.finish_reason is None:
            self._finish(sequence, reason)

    def step(self) -> list[Sequence]:
        """Admit what fits, put one batch through the model, sample. Returns the sequences that gained or ended."""
        began_at = time.monotonic()
        ended = self._expire()
        while self._waiting and self._free_slots:
            self._admit(self._waiting.popleft())
        parts = self._parts()
        if not parts:
            return ended
        sampled = self._fill_batch(parts)
        batch = self._runner.batch
        self._runner.step(sum(count for _, count in parts), len(sampled))
        for sequence, count in parts:  # after the pass: one that was interrupted is made again
            self._cached[sequence.slot] += sequence.next_ids(count)  # type: ignore[index]  # running: it has a slot
            sequence.n_cached += count
        n_later = sum(
            self._append(sequence, token, batch.logits[row, : self.config.vocab_size])
            for row, (sequence, token) in enumerate(zip(sampled, batch.chosen[: len(sampled)].tolist(), strict=True))
        )
        self._count_step(began_at, len(sampled), n_later)
        return ended + sampled

    def _count_step(self, began_at: float, n_sampled: int, n_later: int) -> None:
        """n_later: tokens that were not their answer's first; what decodes has had its last one from the last step."""
        now = time.monotonic()
        self.stats.step_s.observe(now - began_at)
        if n_sampled:
            self.stats.batch_size.observe(n_sampled)
        if n_later:
            self.stats.inter_token_s.observe(now - self._stepped_at, n_later)
        self._stepped_at = now

    def _expire(self) -> list[Sequence]:
        now = time.monotonic()
        if now < self._next_deadline:
            return []
        waited_for = [s for s in (*self._running, *self._waiting) if s.deadline is not None]
        late = [s for s in waited_for if s.deadline <= now]  # type: ignore[operator]
        for sequence in late:
            self._finish(sequence, "timeout")
        self._next_deadline = min((s.deadline for s in waited_for if s not in late), default=float("inf"))  # type: ignore[type-var, assignment]
        return late

    def _admit(self, sequence: Sequence) -> None:
        """Give a sequence a slot, with as much of its prompt as any slot still holds the keys and values of."""
        shared = [_common_prefix(sequence.prompt, cached) for cached in self._cached]
        slot = max(self._free_slots, key=shared.__getitem__)
        n_reused = shared[slot]
        source = max(range(self.n_slots), key=shared.__getitem__)
        if not n_reused:
            slot = self._free_slots[0]
        if shared[source] >= n_reused + LEAST_TO_COPY:
            n_reused = shared[source]
            slot = self._free_slots[0]
            self._runner.copy_prefix(source, slot, n_reused)
        self._free_slots.remove(slot)
        self._cached[slot] = sequence.prompt[:n_reused]
        sequence.slot, sequence.n_cached, sequence.n_reused = slot, n_reused, n_reused
        sequence.admitted_at = time.monotonic()
        self.stats.n_prompt_tokens += len(sequence.prompt)
        self.stats.n_reused_tokens += n_reused
        batch = self._runner.batch
        batch.set_params(slot, sequence.params)
        batch.seen[slot] = False
        batch.seen[slot, sequence.prompt] = True
        batch.seen[slot, self.config.boundary_id] = False  # it begins every prompt, and the penalty is for text
        self._running.append(sequence)

    def _parts(self) -> list[tuple[Sequence, int]]:
        """Running sequences and how many tokens of each go in: one of those decoding, a share of those in prefill."""
        parts = [(s, 1) for s in self._running if s.n_tokens - s.n_cached == 1]
        if len(parts) == len(self._running):
            return parts
        budget = self._prefill_tokens if parts else self.config.context
        for sequence in self._running:
            pending = sequence.n_tokens - sequence.n_cached
            if pending > 1 and budget > 0:
                count = min(pending, budget)
                budget -= count
                parts.append((sequence, count))
        return parts

    def _fill_batch(self, parts: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Write the parts' tokens into the batch. Returns the sequences that get a token from it, a row each."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        sampled: list[Sequence] = []
        for sequence, count in parts:
            ids += sequence.next_ids(count)
            slots += [sequence.slot] * count  # type: ignore[list-item]
            positions += range(sequence.n_cached, sequence.n_cached + count)
            if sequence.n_cached + count == sequence.n_tokens:
                rows.append(len(ids) - 1)
                sampled.append(sequence)
        batch = self._runner.batch
        batch.ids[: len(ids)] = ids
        batch.slots[: len(ids)] = slots
        batch.positions[: len(ids)] = positions
        batch.rows[: len(rows)] = rows
        batch.uniforms[: len(rows)] = [sequence.uniform for sequence in sampled]
        return sampled

    def _append(self, sequence: Sequence, token: int, logits: np.ndarray) -> bool:
        """Give a sequence the token that was drawn. Returns whether its answer has gained one after the first."""
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        if token == self.config.boundary_id:
            self._finish(sequence, "stop")
            return False
        if sequence.params.logprobs is not None:  # before its token, so that no other thread sees the token alone
            sequence.logprobs.append(token_logprobs(logits, token, sequence.params.logprobs))
        sequence.tokens.append(token)
        sequence.uniform = sequence.rng.random()
        self._runner.batch.seen[sequence.slot, token] = True
        if len(sequence.tokens) >= sequence.params.max_tokens or sequence.n_tokens >= self.config.context:
            self._finish(sequence, "length")
        return len(sequence.tokens) > 1

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        sequence.finished_at = time.monotonic()
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._free_slots.append(sequence.slot)
            sequence.slot = None
        self._n_unfinished -= 1


def _common_prefix(prompt: list[int], cached: list[int]) -> int:
    """How many tokens both begin with, the prompt's last left out: what follows it must be computed."""
    limit = min(len(prompt) - 1, len(cached))
    return next((i for i in range(limit) if prompt[i] != cached[i]), limit)


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

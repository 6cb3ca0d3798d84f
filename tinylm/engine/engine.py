"""Continuous batching: run the tokens of many requests through the model, one batch per step.

A slot keeps the keys and values of its last request until another request gets the slot. A prompt that begins like an
earlier prompt reuses that prefix. The engine is synchronous: its owner calls `step` while `has_work` is true. It takes
and returns token ids. `tinylm.engine.scheduler` makes the decisions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import numpy as np

from tinylm.engine.logit_changes import logit_changes
from tinylm.engine.logprobs import token_logprobs
from tinylm.engine.request import Request, check_ids, check_length, mark_seen, whole_ids
from tinylm.engine.scheduler import choose_slot, share_tokens
from tinylm.engine.stats import EngineStats
from tinylm.engine.steps import Share, StepLog
from tinylm.engine.word_tokens import WordTokens
from tinylm.model import Model, ModelRunner
from tinylm.sampling import FinishReason, SamplingParams

MAX_OVERTAKEN = 256  # then no request goes ahead of a waiting one any more, so that none waits for ever


class EngineFull(RuntimeError):
    """All slots are in use and the queue is full: try again later."""


class Engine:
    """Runs up to `n_slots` requests at once. Further requests wait for a slot.

    A waiting request with a higher priority gets a slot first. Equal priorities keep the order in which they came. A
    request is overtaken by at most MAX_OVERTAKEN others.

    An exception in `step`, such as a KeyboardInterrupt, loses nothing: the next step computes again what the
    interrupted step did not finish.

    Threads: only one thread at a time may call `step`, read a `Request`, or add a request that has a deadline or a
    priority other than 0. Any thread may call everything else at any time, also during a step:

    - `add`, `cancel`, `has_work` and `check_room` use `_unfinished` by single list operations, which are atomic. A step
      works on a copy of this list. To insert a request with a priority, `add` reads the list before it changes it.
      Between the two, other threads can only append requests of priority 0, which belong behind it, and remove
      requests. A removal can move the place of the new request behind one that it would have overtaken.
    - A step may still give a token to a request that another thread cancels, so a thread that cancels a request must
      not read it afterwards.
    - `n_running`, `n_waiting` and `kv_usage` read one integer per request and are right up to one step.
    - `stats` and `steps`: see `EngineStats` and `StepLog`. `model`, `config`, `n_slots` and `cache_bytes` never change.
    """

    def __init__(self, model: Model, n_slots: int = 16, max_waiting: int = 256, prefill_tokens: int = 64) -> None:
        """prefill_tokens: the most prompt tokens in a step while other requests decode. Larger steps delay these."""
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
        self._runner = ModelRunner(model, n_slots, n_tokens=n_tokens, n_rows=n_tokens)
        self._max_waiting = max_waiting
        self._prefill_tokens = prefill_tokens
        self._unfinished: list[Request] = []  # in the order of admission; the first n_slots have the slots
        self._cached: list[Request | None] = [None] * n_slots  # the request whose keys and values each slot holds
        self._in_step = False  # between steps, True means that an exception ended the last step
        self._next_deadline = float("inf")  # no request has an earlier deadline
        self.stats = EngineStats()
        self.steps = StepLog()
        self._stepped_at = time.monotonic()  # when the last step ended

    @property
    def cache_bytes(self) -> int:
        """Return the size of the KV cache in bytes."""
        return self._runner.cache_bytes

    @property
    def n_running(self) -> int:
        return sum(request.slot is not None for request in self._unfinished[: self.n_slots])

    @property
    def n_waiting(self) -> int:
        return len(self._unfinished) - self.n_running

    @property
    def kv_usage(self) -> float:
        """Return the share of the KV cache's positions (n_slots times the context) that running requests use."""
        n_cached = sum(request.n_cached for request in self._unfinished[: self.n_slots])
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

    def make_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        timeout_s: float | None = None,
        words: WordTokens | None = None,
    ) -> Request:
        """Return the request for a prompt of token ids (with its boundary). `add` queues it.

        words: what `word_tokens` returns for these settings.
        Raise ValueError if the prompt is empty, contains an unknown id or leaves no room in the context for an answer,
        or if the settings contain an unknown id or forbid all tokens.
        """
        check_length(len(prompt), self.config.context, params.max_tokens)
        prompt = whole_ids(prompt)
        check_ids(prompt, self.config.vocab_size)
        check_ids(params.stop_token_ids, self.config.vocab_size, "stop_token_ids")
        check_ids(params.logit_bias, self.config.vocab_size, "logit_bias")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        max_tokens = min(params.max_tokens, self.config.context - len(prompt))
        uniforms = np.random.default_rng(params.seed).random(max_tokens).tolist()
        ends = frozenset((self.config.boundary_id, *params.stop_token_ids))
        return Request(prompt, params, deadline, uniforms, ends, logit_changes(params, words, self.config))

    def add(self, request: Request) -> None:
        """Queue a request that `make_request` returned. Raise EngineFull if the queue is full."""
        self.check_room()
        if request.deadline is not None:
            self._next_deadline = min(self._next_deadline, request.deadline)
        if request.priority == 0:
            self._unfinished.append(request)
        else:
            self._insert(request)

    def _insert(self, request: Request) -> None:
        """Queue a request ahead of the waiting requests with a lower priority, but behind any running request."""
        waiting = self._unfinished.copy()
        place = len(waiting)
        while place > 0 and _may_overtake(request, waiting[place - 1]):
            place -= 1
        for other in waiting[place:]:
            other.n_overtaken += 1
        self._unfinished.insert(place, request)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        timeout_s: float | None = None,
        words: WordTokens | None = None,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt and return its request. Raise as `make_request` and `add` do.

        priority: 0 or more. Raise ValueError for a lower one.
        """
        if priority < 0:
            raise ValueError(f"priority is {priority}: it must be at least 0")
        request = self.make_request(prompt, params, timeout_s, words)
        request.priority = priority
        self.add(request)
        return request

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """End a request now. The next step can use its slot. No effect on a request that has ended."""
        self._finish(request, reason)

    def step(self) -> list[Request]:
        """Admit requests, run one batch through the model, sample. Return the requests that gained a token or ended.

        Requests that `cancel` ended before the step are not in this list.
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
        """Rebuild the state after an interrupted step from the requests' tokens alone.

        The content of the KV cache may be wrong, so every unfinished request waits for a slot again. It keeps its
        tokens.
        """
        self._cached = [None] * self.n_slots
        self._next_deadline = 0.0
        for request in self._unfinished.copy():
            request.slot, request.n_cached = None, 0
            if request.wants_prompt_logprobs:
                request.prompt_logprobs.clear()
            del request.logprobs[len(request.tokens) :]
            if request.finish_reason is not None or (request.is_full and not request.wants_prompt_logprobs):
                self._finish(request, "length")

    def _run(self, running: list[Request], began_at: float) -> list[Request]:
        """Run one batch of tokens of these requests through the model. Return those that got a token or ended."""
        pending = [request.n_tokens - request.n_cached for request in running]
        shares = share_tokens(pending, self._prefill_tokens, self.config.context)
        parts = [(running[place], count) for place, count in shares]
        n_tokens = sum(count for _, count in parts)
        sampled = self._fill_batch(parts)
        scored = self._add_scored_rows(parts, len(sampled))
        filled_at = time.monotonic()
        if sampled:
            self._runner.step(n_tokens, len(sampled) + sum(n_rows for _, n_rows in scored))
        else:
            self._runner.compute(n_tokens, sum(n_rows for _, n_rows in scored))
        computed_at = time.monotonic()
        if scored:
            self._append_scores(scored, len(sampled))
        for request, count in parts:
            request.n_cached += count
        chosen = self._runner.batch.chosen[: len(sampled)].tolist()
        n_later = sum(
            self._append(request, token, row) for row, (request, token) in enumerate(zip(sampled, chosen, strict=True))
        )
        self._count_step(began_at, len(sampled), n_later)
        if self.steps.is_watched(began_at):
            times = (began_at, filled_at, computed_at, self._stepped_at)
            self.steps.record(times, self.n_waiting, [_share(request, count) for request, count in parts])
        return sampled + self._finish_without_answer(parts)

    def _count_step(self, began_at: float, n_sampled: int, n_later: int) -> None:
        """Count a step. n_later: how many of the sampled tokens were not the first token of their answer."""
        now = time.monotonic()
        self.stats.step_s.observe(now - began_at)
        if n_sampled:
            self.stats.batch_size.observe(n_sampled)
        if n_later:
            self.stats.inter_token_s.observe(now - self._stepped_at, n_later)
        self._stepped_at = now

    def _expire(self) -> list[Request]:
        """End the requests whose deadline has passed, and return them."""
        now = time.monotonic()
        if now < self._next_deadline:
            return []
        with_deadline = [(s.deadline, s) for s in self._unfinished.copy() if s.deadline is not None]
        late = [s for deadline, s in with_deadline if deadline <= now]
        for request in late:
            self._finish(request, "timeout")
        self._next_deadline = min((deadline for deadline, _ in with_deadline if deadline > now), default=float("inf"))
        return late

    def _admitted(self) -> list[Request]:
        """Give a slot to each of the first n_slots requests that has none. Return the first n_slots requests."""
        first = self._unfinished[: self.n_slots]
        for request in first:
            if request.slot is None:
                taken = {other.slot for other in first}
                self._admit(request, [slot for slot in range(self.n_slots) if slot not in taken])
        return first

    def _admit(self, request: Request, free: list[int]) -> None:
        """Give a request one of the free slots, with the longest prefix of its tokens that any slot holds."""
        ids = request.prompt + request.tokens  # a request has tokens if it ran before an interrupted step
        cached = [[] if s is None else (s.prompt + s.tokens)[: s.n_cached] for s in self._cached]
        if request.wants_prompt_logprobs:  # they need the logits of every token of the prompt
            cached = [[] for _ in cached]
        slot, source, n_cached = choose_slot(ids, cached, sorted(free, key=self._unused_since))
        if source != slot:
            self._runner.copy_prefix(source, slot, n_cached)
        self._cached[slot] = request
        request.slot, request.n_cached = slot, n_cached
        batch = self._runner.batch
        batch.set_params(slot, request.params)
        mark_seen(batch.seen[slot], ids, self.config.boundary_id)
        batch.biased[slot] = request.changes is not None
        if request.changes is not None:
            request.changes.begin(request.prompt)
        if request.admitted_at is None:
            request.admitted_at = time.monotonic()
            request.n_reused = n_cached
            self.stats.n_admitted += 1
            request.number = self.stats.n_admitted
            self.stats.n_prompt_tokens += len(request.prompt)
            self.stats.n_reused_tokens += n_cached

    def _unused_since(self, slot: int) -> float:
        request = self._cached[slot]
        return 0.0 if request is None else request.finished_at or 0.0

    def _fill_batch(self, parts: list[tuple[Request, int]]) -> list[Request]:
        """Write the parts' tokens into the batch. Return the requests that get a token from this batch, one per row."""
        batch = self._runner.batch
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        sampled: list[Request] = []
        for request, count in parts:
            ids += request.next_ids(count)
            slots += [request.slot] * count  # type: ignore[list-item]  # a running request has a slot
            positions += range(request.n_cached, request.n_cached + count)
            if request.n_cached + count == request.n_tokens and not request.is_full:
                rows.append(len(ids) - 1)
                sampled.append(request)
                if request.changes is not None:
                    request.changes.write(request.tokens, batch.bias[request.slot])
        batch.ids[: len(ids)] = ids
        batch.slots[: len(ids)] = slots
        batch.positions[: len(ids)] = positions
        batch.rows[: len(rows)] = rows
        batch.uniforms[: len(rows)] = [request.uniforms[len(request.tokens)] for request in sampled]
        return sampled

    def _add_scored_rows(self, parts: list[tuple[Request, int]], row: int) -> list[tuple[Request, int]]:
        """Write rows for the prompt tokens whose logits score the next prompt token, from `row` on.

        Return the requests with their numbers of rows.
        """
        scored, first = [], 0
        for request, count in parts:
            n_rows = min(count, len(request.prompt) - 1 - request.n_cached)
            if request.wants_prompt_logprobs and n_rows > 0:
                self._runner.batch.rows[row : row + n_rows] = np.arange(first, first + n_rows)
                row += n_rows
                scored.append((request, n_rows))
            first += count
        return scored

    def _append_scores(self, scored: list[tuple[Request, int]], row: int) -> None:
        """Give these requests the log-probabilities of prompt tokens from the rows that `_add_scored_rows` wrote."""
        for request, n_rows in scored:
            logits = self._runner.batch.logits[row : row + n_rows, : self.config.vocab_size]
            tokens = request.prompt[request.n_cached + 1 : request.n_cached + 1 + n_rows]
            request.prompt_logprobs += token_logprobs(logits, tokens, request.params.prompt_logprobs or 0)
            row += n_rows

    def _finish_without_answer(self, parts: list[tuple[Request, int]]) -> list[Request]:
        """End the requests that want no answer and whose prompt has been computed. Return them."""
        ended = [request for request, _ in parts if not request.uniforms and request.n_cached == request.n_tokens]
        for request in ended:
            self._finish(request, "length")
        return ended

    def _append(self, request: Request, token: int, row: int) -> bool:
        """Give a request the token of a row of the batch. Return whether the answer has another token before it."""
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        batch, params = self._runner.batch, request.params
        scores = (
            []
            if params.logprobs is None
            else token_logprobs(batch.logits[row : row + 1, : self.config.vocab_size], [token], params.logprobs)
        )
        if token in request.ends:
            request.ending = (token, scores[0]) if scores else None
            self._finish(request, "stop")
            return False
        request.logprobs += scores  # before the token: `_recover` deletes one that has no token
        request.tokens.append(token)
        if params.repetition_penalty != 1:
            batch.seen[request.slot, token] = True
        if request.is_full:
            self._finish(request, "length")
        return len(request.tokens) > 1

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Record the end of a request and remove it. It is safe to call this again, also after an interrupted call."""
        if request.finish_reason is None:
            request.finished_at = time.monotonic()
            request.finish_reason = reason
        with suppress(ValueError):  # it is removed already
            self._unfinished.remove(request)


def _may_overtake(request: Request, other: Request) -> bool:
    return other.slot is None and other.priority < request.priority and other.n_overtaken < MAX_OVERTAKEN


def _share(request: Request, count: int) -> Share:
    """Return the part of a request in a step that has put `count` of its tokens into the cache."""
    first = request.n_cached - count
    kind: Literal["prompt", "answer"] = "prompt" if first < len(request.prompt) else "answer"
    return Share(request.number, request.slot, count, kind)  # type: ignore[arg-type]  # a running request has a slot

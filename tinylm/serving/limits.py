"""Count what each API key used in the last minute, and decide whether its limits admit another call.

This module knows neither Ray nor gRPC. `tinylm.serving.ray.shared_limits` makes one count for all replicas.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

WINDOW_NS = 60 * 10**9  # limits are per minute

Kind = Literal["requests", "tokens"]
KINDS: tuple[Kind, ...] = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use in any minute. None means no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts and answers together

    @property
    def is_set(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The limit that refuses a call, and the time after which it would admit the call."""

    kind: Kind
    limit: int  # per minute
    wait_ns: int


@dataclass(slots=True)
class Entry:
    """An amount that was admitted at one time. It counts until `leaves_ns`, and not at that time any more."""

    leaves_ns: int
    amount: int


class SlidingWindow:
    """A sliding window log: the amounts that were admitted in the last minute, each with its time.

    At every time t, the amounts admitted in (t - 1 minute, t] sum up to the limit at most. A token bucket would admit
    up to twice the limit in a minute. Times are whole nanoseconds and must not decrease, so that sums are exact.
    """

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()  # the oldest first
        self._total = 0

    def wait_ns(self, amount: int, limit: int, now_ns: int) -> int:
        """Return 0 if `amount` can be admitted now, else the time until it can be, if nothing else is admitted.

        Raise ValueError for an amount above the limit, which can never be admitted.
        """
        if amount > limit:
            raise ValueError(f"amount is {amount}: it must be at most the limit, {limit}")
        self._drop_old(now_ns)
        excess = self._total + amount - limit
        wait_ns = 0
        for entry in self._entries:
            if excess <= 0:
                break
            excess -= entry.amount
            wait_ns = entry.leaves_ns - now_ns
        return wait_ns

    def add(self, amount: int, now_ns: int) -> Entry:
        """Admit an amount and return its entry."""
        entry = Entry(now_ns + WINDOW_NS, amount)
        self._entries.append(entry)
        self._total += amount
        return entry

    def reduce(self, entry: Entry, amount: int) -> None:
        """Lower an entry to the amount that was used. No effect if that is more, or if the entry has left."""
        unused = entry.amount - amount
        if unused > 0:
            entry.amount = amount
            self._total -= unused

    def _drop_old(self, now_ns: int) -> None:
        while self._entries and self._entries[0].leaves_ns <= now_ns:
            entry = self._entries.popleft()
            self._total -= entry.amount
            entry.amount = 0


class RateLimiter:
    """The windows of all keys. A call reserves the most that it can use, and gives back at its end what it did not.

    A refused call counts nothing. A reservation that nobody ends, because its replica died, leaves with its window.
    Not thread-safe.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._windows: dict[str, dict[Kind, SlidingWindow]] = {}  # by the name of the key
        self._reserved: dict[str, tuple[int, list[tuple[Kind, SlidingWindow, Entry]]]] = {}  # by ticket, oldest first

    def reserve(self, ticket: str, name: str, limits: Limits, n_tokens: int) -> Refusal | None:
        """Admit a call of one request and `n_tokens` tokens, or return the refusal of the limit with the longest wait.

        ticket: a name for the reservation, which nobody else uses.
        Raise ValueError if the call has more tokens than the limit, so that it can never be admitted.
        """
        now_ns = self._clock_ns()
        self._forget_old(now_ns)
        windows = self._windows.setdefault(name, {kind: SlidingWindow() for kind in KINDS})
        needs: list[tuple[Kind, int, int]] = []  # (kind, limit, amount)
        if limits.requests_per_minute is not None:
            needs.append(("requests", limits.requests_per_minute, 1))
        if limits.tokens_per_minute is not None:
            needs.append(("tokens", limits.tokens_per_minute, n_tokens))
        refusals = [Refusal(kind, limit, windows[kind].wait_ns(amount, limit, now_ns)) for kind, limit, amount in needs]
        longest = max(refusals, key=lambda refusal: refusal.wait_ns, default=None)
        if longest is not None and longest.wait_ns > 0:
            return longest
        entries = [(kind, windows[kind], windows[kind].add(amount, now_ns)) for kind, _, amount in needs]
        self._reserved[ticket] = (now_ns + WINDOW_NS, entries)
        return None

    def release(self, ticket: str, n_requests: int, n_tokens: int) -> None:
        """End a reservation: only what was used still counts, from the time of the reservation on.

        No effect on a ticket that is unknown or has ended.
        """
        used: dict[Kind, int] = {"requests": n_requests, "tokens": n_tokens}
        _, entries = self._reserved.pop(ticket, (0, []))
        for kind, window, entry in entries:
            window.reduce(entry, used[kind])

    def _forget_old(self, now_ns: int) -> None:
        """Forget reservations whose window has passed: nothing of them counts any more."""
        while self._reserved and (oldest := next(iter(self._reserved))) and self._reserved[oldest][0] <= now_ns:
            del self._reserved[oldest]

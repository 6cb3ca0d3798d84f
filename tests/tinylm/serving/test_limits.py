"""The limits of a key against a slow, obvious count: never too much in any minute, and the right time to retry."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.serving.limits import WINDOW_NS, Limits, RateLimiter, SlidingWindow

SECOND_NS = 10**9
# Steps of the clock: often none, often close to a window, so that entries leave exactly at a request.
STEPS = st.one_of(
    st.just(0), st.integers(0, 3), st.integers(0, 2 * WINDOW_NS), st.sampled_from([WINDOW_NS - 1, WINDOW_NS])
)
AMOUNTS = st.integers(0, 12)


@dataclass
class Clock:
    now_ns: int = 0

    def __call__(self) -> int:
        return self.now_ns


@dataclass
class SlowCount:
    """All that was ever admitted: [time, requests, tokens] of each call."""

    calls: dict[str, list[int]] = field(default_factory=dict)

    def used(self, column: int, now_ns: int) -> int:
        return sum(call[column] for call in self.calls.values() if now_ns - WINDOW_NS < call[0] <= now_ns)

    def admits(self, limits: Limits, n_tokens: int, now_ns: int) -> bool:
        return (limits.requests_per_minute is None or self.used(1, now_ns) + 1 <= limits.requests_per_minute) and (
            limits.tokens_per_minute is None or self.used(2, now_ns) + n_tokens <= limits.tokens_per_minute
        )


@given(steps=st.lists(st.tuples(STEPS, AMOUNTS, AMOUNTS, st.integers(0, 4)), max_size=40))
def test_no_minute_has_more_than_the_limit(steps):
    """Each amount is reduced after some later steps, perhaps when it has left the window already."""
    limit, now_ns, window = 12, 0, SlidingWindow()
    admitted: list[list[int]] = []  # [time, amount]
    due: dict[int, list] = {}  # after which step which entries are reduced
    for number, (step_ns, amount, used, n_later) in enumerate(steps):
        now_ns += step_ns
        in_minute = sum(a for t, a in admitted if now_ns - WINDOW_NS < t)
        wait_ns = window.wait_ns(amount, limit, now_ns)
        assert (wait_ns == 0) == (in_minute + amount <= limit)
        if wait_ns == 0:
            admitted.append([now_ns, amount])
            due.setdefault(number + n_later, []).append((window.add(amount, now_ns), used, admitted[-1]))
        for entry, used_, record in due.get(number, []):
            window.reduce(entry, used_)
            record[1] = min(record[1], used_)
    for end, _ in admitted:
        assert sum(a for t, a in admitted if end - WINDOW_NS < t <= end) <= limit


@given(
    before=st.lists(st.tuples(st.integers(0, WINDOW_NS // 4), AMOUNTS), max_size=20),
    amount=AMOUNTS,
    limit=st.integers(12, 20),
)
def test_the_named_wait_admits_and_a_shorter_one_does_not(before, amount, limit):
    now_ns, window = 0, SlidingWindow()
    for step_ns, earlier in before:
        now_ns += step_ns
        if window.wait_ns(earlier, limit, now_ns) == 0:
            window.add(earlier, now_ns)
    wait_ns = window.wait_ns(amount, limit, now_ns)
    if wait_ns > 0:
        assert window.wait_ns(amount, limit, now_ns + wait_ns - 1) == 1
        assert window.wait_ns(amount, limit, now_ns + wait_ns) == 0


def test_an_amount_above_the_limit_is_an_error():
    with pytest.raises(ValueError, match="amount is 6: it must be at most the limit, 5"):
        SlidingWindow().wait_ns(6, 5, 0)


LIMITS = st.builds(Limits, st.one_of(st.none(), st.integers(1, 4)), st.one_of(st.none(), st.integers(12, 30)))


@given(
    limits=st.fixed_dictionaries({"alice": LIMITS, "bob": LIMITS}),
    calls=st.lists(
        st.tuples(STEPS, st.sampled_from(["alice", "bob"]), AMOUNTS, st.integers(0, 15), st.integers(0, 4)), max_size=40
    ),
)
def test_a_limiter_decides_as_the_slow_count(limits, calls):
    """Each call ends after some later calls, or never, and then has used less, as much, or more than it reserved."""
    clock = Clock()
    limiter, slow = RateLimiter(clock), {name: SlowCount() for name in limits}
    ends: dict[int, list[tuple[str, str, int]]] = {}  # after which call which others end
    for number, (step_ns, name, n_tokens, n_used, n_later) in enumerate(calls):
        clock.now_ns += step_ns
        ticket = str(number)
        expected = slow[name].admits(limits[name], n_tokens, clock.now_ns)
        refusal = limiter.reserve(ticket, name, limits[name], n_tokens)
        assert (refusal is None) == expected
        if refusal is None:
            slow[name].calls[ticket] = [clock.now_ns, 1, n_tokens]
            if n_later < 4:
                ends.setdefault(number + n_later, []).append((name, ticket, n_used))
        else:
            assert refusal.limit == getattr(limits[name], f"{refusal.kind}_per_minute")
            at_ns = clock.now_ns + refusal.wait_ns
            assert slow[name].admits(limits[name], n_tokens, at_ns)
            assert not slow[name].admits(limits[name], n_tokens, at_ns - 1)
        for name_, ticket_, n_used_ in ends.get(number, []):
            limiter.release(ticket_, 1, n_used_)
            call = slow[name_].calls[ticket_]
            call[2] = min(call[2], n_used_)


def test_a_call_that_was_not_served_counts_nothing():
    limiter, limits = RateLimiter(Clock()), Limits(1, 10)
    assert limiter.reserve("a", "alice", limits, 10) is None
    assert limiter.reserve("b", "alice", limits, 1).kind == "requests"
    limiter.release("a", 0, 0)
    assert limiter.reserve("b", "alice", limits, 10) is None
    limiter.release("a", 0, 0)  # a second time
    assert limiter.reserve("c", "alice", limits, 1) is not None


def test_reservations_that_nobody_ends_are_forgotten():
    """A replica that dies never ends them."""
    clock = Clock()
    limiter = RateLimiter(clock)
    for number in range(100):
        assert limiter.reserve(str(number), "alice", Limits(None, 1), 1) is None
        clock.now_ns += WINDOW_NS
    assert len(limiter._reserved) == 1

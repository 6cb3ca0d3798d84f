"""Limits over several replicas: with one count for all, without it, and with a real Ray actor whose process ends."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import ray
from ray.exceptions import ActorDiedError

from tinylm.serving.calls import RateLimited
from tinylm.serving.keys import Key
from tinylm.serving.limits import Limits, RateLimiter
from tinylm.serving.ray import shared_limits
from tinylm.serving.ray.shared_limits import SharedLimits

GIVE_UP_S = 60
THREE = Key("alice", "", Limits(requests_per_minute=3))
TEN_TOKENS = Key("bob", "", Limits(tokens_per_minute=10))


@dataclass
class Counter:
    """A real count, called as a Ray actor is, which can end or become silent."""

    limiter: RateLimiter = field(default_factory=RateLimiter)
    fault: str = ""
    n_calls: int = 0

    @property
    def reserve(self) -> Counter.Method:
        return self.Method(self, self.limiter.reserve)

    @property
    def release(self) -> Counter.Method:
        return self.Method(self, self.limiter.release)

    @dataclass
    class Method:
        counter: Counter
        function: Callable

        def remote(self, *arguments: object) -> asyncio.Future:
            answer = asyncio.get_running_loop().create_future()
            self.counter.n_calls += 1
            if self.counter.fault == "ended":
                answer.set_exception(ActorDiedError())
                answer.exception()  # no warning if nobody waits
            elif self.counter.fault != "silent":
                answer.set_result(self.function(*arguments))
            return answer


async def take(limits: SharedLimits, key: Key = THREE, n_tokens: int = 1):
    """Return the reservation of an admitted call, None for a refused one."""
    reservation = limits.reservation(key, n_tokens)
    try:
        await reservation.take()
    except RateLimited:
        return None
    return reservation


async def n_admitted(*replicas: SharedLimits, n_calls: int = 12) -> int:
    """Send calls to the replicas in turn, all at the same time."""
    taken = await asyncio.gather(*(take(replicas[i % len(replicas)]) for i in range(n_calls)))
    return sum(reservation is not None for reservation in taken)


def test_all_replicas_together_admit_the_limit():
    async def check() -> None:
        counter = Counter()
        replicas = [SharedLimits(lambda: counter) for _ in range(4)]
        assert await n_admitted(*replicas) == 3

    asyncio.run(check())


def test_an_ended_call_gives_back_what_it_did_not_use():
    async def check() -> None:
        counter = Counter()
        one, other = SharedLimits(lambda: counter), SharedLimits(lambda: counter)
        first = await take(one, TEN_TOKENS, 10)
        assert await take(other, TEN_TOKENS, 1) is None
        first.end(1, 4)
        second = await take(other, TEN_TOKENS, 6)
        second.end(0, 0)  # the engine did not accept it
        assert await take(one, TEN_TOKENS, 7) is None
        assert await take(one, TEN_TOKENS, 6) is not None
        requests = [await take(one, THREE) for _ in range(3)]
        n_calls = counter.n_calls
        requests[0].end(1, 100)
        assert counter.n_calls == n_calls  # without a limit of tokens there is nothing to give back
        requests[0].end(0, 0)
        assert await take(other, THREE) is not None

    asyncio.run(check())


def test_a_call_cancelled_while_it_asks_gives_everything_back():
    async def check() -> None:
        counter = Counter()
        limits = SharedLimits(lambda: counter)
        reservation = limits.reservation(THREE, 1)
        task = asyncio.create_task(reservation.take())
        deadline = time.monotonic() + GIVE_UP_S
        while not counter.limiter._reserved:
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        reservation.end(0, 0)
        assert await n_admitted(limits) == 3

    asyncio.run(check())


@pytest.mark.parametrize("fault", ["ended", "silent"])
def test_without_an_answer_each_replica_counts_alone(fault: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_limits, "ANSWER_WITHIN_S", 0.05)
    monkeypatch.setattr(shared_limits, "LOOK_AGAIN_S", 1000.0)

    async def check() -> None:
        counter = Counter()
        replicas = [SharedLimits(lambda: counter) for _ in range(2)]
        assert await n_admitted(*replicas) == 3
        counter.fault = fault
        assert await n_admitted(*replicas) == 6
        assert await n_admitted(*replicas) == 0
        n_calls = counter.n_calls
        assert await n_admitted(*replicas) == 0
        assert counter.n_calls == n_calls  # no call waits for it any more
        assert all(replica.alone._windows["alice"] for replica in replicas)

    asyncio.run(check())


def test_a_replica_that_counts_alone_gives_back_too():
    async def check() -> None:
        limits = SharedLimits(lambda: Counter(fault="ended"))
        first = await take(limits, TEN_TOKENS, 10)
        assert await take(limits, TEN_TOKENS, 1) is None
        first.end(1, 4)
        assert await take(limits, TEN_TOKENS, 7) is None
        assert await take(limits, TEN_TOKENS, 6) is not None

    asyncio.run(check())


def test_a_replica_finds_the_next_counter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_limits, "LOOK_AGAIN_S", 0.0)

    async def check() -> None:
        counters = [Counter(), Counter()]
        one, other = (SharedLimits(lambda: next(c for c in counters if c.fault != "ended")) for _ in range(2))
        assert await n_admitted(one, other) == 3
        counters[0].fault = "ended"
        deadline = time.monotonic() + GIVE_UP_S
        while one._counter is not counters[1] or other._counter is not counters[1]:
            assert time.monotonic() < deadline
            await n_admitted(one, other)
            await asyncio.sleep(0.001)
        assert len(counters[1].limiter._reserved) <= 3
        await n_admitted(one, other)
        assert len(counters[1].limiter._reserved) == 3

    asyncio.run(check())


def test_a_counter_that_cannot_be_opened_delays_only_the_first_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shared_limits, "LOOK_AGAIN_S", 0.0)
    blocked = threading.Event()
    opened: list[None] = []

    def open_counter() -> Counter:
        opened.append(None)
        if len(opened) > 1:
            blocked.wait(GIVE_UP_S)
        raise ConnectionError("no head")

    async def check() -> None:
        limits = SharedLimits(open_counter)
        assert await n_admitted(limits) == 3
        assert len(opened) == 1
        assert await take(limits) is None  # does not wait for the second connection
        assert limits._connecting is not None
        assert not limits._connecting.done()
        blocked.set()
        await limits._connecting

    asyncio.run(check())


# --- a real Ray actor


class Replica:
    """A process that asks the real actor, as a replica does."""

    async def begin(self) -> None:
        self.limits = SharedLimits(lambda: shared_limits.open_counter("test"))

    async def admitted(self, n_calls: int) -> int:
        return await n_admitted(self.limits, n_calls=n_calls)

    async def is_alone(self) -> bool:
        return await self.limits.counter() is None


def test_replicas_share_a_real_actor_until_its_owner_ends(monkeypatch: pytest.MonkeyPatch):
    # Otherwise Ray sets it to "token" here, and later tests start services that inherit it.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import this file
    ray.init(num_cpus=4, include_dashboard=False, namespace="limits", logging_level="error")
    try:
        replicas = [ray.remote(num_cpus=0)(Replica).remote() for _ in range(3)]
        ray.get([replica.begin.remote() for replica in replicas])
        assert ray.get(replicas[0].admitted.remote(2)) == 2  # this one owns the actor
        assert sum(ray.get([replica.admitted.remote(5) for replica in replicas])) == 1
        ray.kill(replicas[0])  # and its actor ends too
        others, deadline = replicas[1:], time.monotonic() + GIVE_UP_S
        while not any(ray.get([replica.is_alone.remote() for replica in others])):
            ray.get([replica.admitted.remote(1) for replica in others])
            assert time.monotonic() < deadline
        assert all(n <= 3 for n in ray.get([replica.admitted.remote(5) for replica in others]))
        while any(ray.get([replica.is_alone.remote() for replica in others])):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sum(ray.get([replica.admitted.remote(5) for replica in others])) == 3
        actor = ray.get_actor("tinylm-limits-test")
        assert ray.get(actor.reserve.remote("t", "alice", THREE.limits, 1)).kind == "requests"
        assert not actor._ray_enable_task_events, "Ray's head keeps a record of each call"
    finally:
        ray.shutdown()

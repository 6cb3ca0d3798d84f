"""Enforce the limits of keys over all replicas: one Ray actor counts, and each replica asks it.

The first replica that gets a call of a key with a limit creates the actor. The actor ends with that replica, and the
next one begins with an empty count. A call of a key without a limit asks nobody.

If the actor does not answer, the replica counts the call by itself, with the whole limit. So a service without the
actor still serves all keys, and each key gets at most its limit times the number of replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from tinylm.serving.calls import RateLimited
from tinylm.serving.keys import Key
from tinylm.serving.limits import RateLimiter, Refusal

logger = logging.getLogger("ray.serve")

ANSWER_WITHIN_S = 0.5  # far above the time of an answer, but short for the caller
START_WITHIN_S = 10.0  # Ray starts a process for the actor
LOOK_AGAIN_S = 1.0  # after a failure, the replica counts by itself for this time


def open_counter(application: str) -> Any:
    """Return the actor that counts for all replicas of an application. Create it if there is none.

    This blocks while Ray's head does not answer. A synchronous actor executes the calls of one replica in their order.
    Ray's head would keep a record of each call, so these are off, as for the actors of Serve.
    """
    actor = ray.remote(num_cpus=0)(RateLimiter)
    name = f"tinylm-limits-{application}"
    return actor.options(name=name, get_if_exists=True, enable_task_events=False).remote()


class SharedLimits:
    """A replica's connection to the actor. It belongs to the event loop of its first call."""

    def __init__(self, open_counter: Callable[[], Any]) -> None:
        """open_counter: returns the actor. It runs in a thread."""
        self._open_counter = open_counter
        self.alone = RateLimiter()  # what this replica counts while the actor does not answer
        self._counter: Any = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_first_connection = True
        self._alone_until = 0.0

    def reservation(self, key: Key, n_tokens: int) -> Reservation:
        """Return the reservation of a call, which has asked nobody yet. n_tokens: the most that the call can use."""
        return Reservation(self, key, n_tokens)

    async def counter(self) -> Any:
        """Return the actor, or None while it does not answer. Only the first connection makes calls wait."""
        if self._counter is None and (self._connecting is None or self._connecting.done()):
            if time.monotonic() < self._alone_until:
                return None
            self._connecting = asyncio.create_task(self._connect())
        if self._is_first_connection and self._connecting is not None:
            await asyncio.wait({self._connecting})
        return self._counter if time.monotonic() >= self._alone_until else None

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(START_WITHIN_S):
                counter = await asyncio.to_thread(self._open_counter)
                await counter.release.remote("", 0, 0)  # changes nothing, and returns when the actor runs
            self._counter = counter
        except Exception as error:  # the next call tries again
            self._count_alone(error)
        finally:
            self._is_first_connection = False

    def failed(self, error: Exception) -> None:
        """Count alone for a while. If the actor has ended, connect to another one after that."""
        if isinstance(error, RayError):
            self._counter = None
        self._count_alone(error)

    def _count_alone(self, error: Exception) -> None:
        self._alone_until = time.monotonic() + LOOK_AGAIN_S
        logger.warning("the counter of the limits does not answer, so this replica counts alone: %r", error)


class Reservation:
    """What one call may use of its key's limits."""

    def __init__(self, shared: SharedLimits, key: Key, n_tokens: int) -> None:
        self._shared, self._key = shared, key
        self._ticket = uuid4().hex
        self._request = (self._ticket, key.name, key.limits, n_tokens)
        self._counter: Any = None
        self._is_alone = False

    async def take(self) -> None:
        """Reserve one request and the tokens. Raise RateLimited if a limit does not admit them now."""
        self._counter = await self._shared.counter()
        answered, refusal = await self._ask()
        if not answered:
            self._is_alone = True
            refusal = self._shared.alone.reserve(*self._request)
        if refusal is not None:
            raise RateLimited(self._key.name, refusal)

    async def _ask(self) -> tuple[bool, Refusal | None]:
        """Return whether the actor answered, and its refusal."""
        if self._counter is None:
            return False, None
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return True, await self._counter.reserve.remote(*self._request)
        except (TimeoutError, RayError) as error:
            self._shared.failed(error)
            return False, None

    def end(self, n_requests: int, n_tokens: int) -> None:
        """Give back what the call did not use. This waits for nothing, and works after a cancelled `take` too."""
        if n_requests > 0 and self._key.limits.tokens_per_minute is None:
            return
        if self._counter is not None:
            with suppress(RayError):
                self._counter.release.remote(self._ticket, n_requests, n_tokens)
        if self._is_alone:
            self._shared.alone.release(self._ticket, n_requests, n_tokens)

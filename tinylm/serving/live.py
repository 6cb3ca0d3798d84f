"""The state of the whole service now: the counters of each replica, and the last steps of its engine.

The replica that gets a request asks all replicas through Serve. Nothing runs, and no step is recorded, while nobody
asks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

if TYPE_CHECKING:
    from tinylm.serving.service import Service

ANSWER_WITHIN_S = 2.0
KEPT_S = 0.5  # all requests within this time get the same view


class LiveMethods:
    """The methods that replicas call on each other. A deployment inherits them."""

    service: Service

    async def live_counts(self) -> dict[str, Any]:
        return counts(self.service)

    async def live_steps(self) -> dict[str, Any]:
        return steps(self.service)


def counts(service: Service) -> dict[str, Any]:
    """Return the counters of this replica. Totals begin at its start."""
    engine, metrics = service.engine.engine, service.metrics
    return {
        "id": service.replica,
        "slots": engine.n_slots,
        "running": engine.n_running,  # requests that hold a slot now
        "waiting": engine.n_waiting,  # requests that wait for a slot now
        "requests": metrics.n_requests,  # total of requests that ended, in any way
        "tokens": int(engine.stats.batch_size.sum),  # total of tokens that the engine generated
        "latency_counts": metrics.latency_s.counts(),  # answers by their time: one bucket per bound, and one above
    }


def steps(service: Service) -> dict[str, Any]:
    """Return the last steps of this replica, and record its next ones."""
    recorded = service.engine.engine.steps.watch()
    return {
        "id": service.replica,
        "slots": service.engine.engine.n_slots,
        "steps": [{**step._asdict(), "shares": [share._asdict() for share in step.shares]} for step in recorded],
    }


class AllReplicas:
    """What all replicas answer to one method, at most KEPT_S old."""

    def __init__(self, method: str, own: Callable[[], dict[str, Any]]) -> None:
        """method: of `LiveMethods`. own: returns this replica's answer, which is used if no replica answers in time."""
        self._method, self._own = method, own
        self._handle: DeploymentHandle[Any] | None = None
        self._lock = asyncio.Lock()
        self._view: dict[str, Any] | None = None
        self._seen_at = 0.0

    async def get(self) -> dict[str, Any]:
        async with self._lock:
            if self._view is None or time.monotonic() - self._seen_at > KEPT_S:
                self._view = await self._ask_all()
                self._seen_at = time.monotonic()
            return self._view

    async def _ask_all(self) -> dict[str, Any]:
        if self._handle is None:
            context = serve.get_replica_context()
            self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            answers = await self._handle.broadcast(self._method).results_async(
                timeout_s=ANSWER_WITHIN_S, return_exceptions=True
            )
        except TimeoutError:  # one stalled replica delays the answers of all
            answers = [TimeoutError()]
        replicas = [answer for answer in answers if not isinstance(answer, BaseException)]
        return {
            "replicas": replicas or [self._own()],
            "complete": len(replicas) == len(answers) > 0,  # whether all replicas answered
        }

"""The state of the whole service now, for the web page: `GET /live` returns the counters of each replica.

The replica that gets the request asks all replicas through Serve. Nothing runs while nobody asks. The counters are
totals, and the page computes rates from two answers.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response

from tinylm.serving.calls import Call, Refused
from tinylm.serving.http.completions import check_access
from tinylm.serving.http.errors import HEADERS, error_response
from tinylm.serving.service import Service

ANSWER_WITHIN_S = 2.0
KEPT_S = 0.5  # all requests within this time get the same view


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    view = LiveView(service)

    @router.get("/live")
    async def live(request: Request) -> Response:
        """Return the view to callers with access. These requests are not logged."""
        try:
            check_access(Call("GET /live"), request, service)
        except Refused as error:
            return error_response(401, error.details, HEADERS[401])
        return JSONResponse(await view.get(), headers={"Cache-Control": "no-store"})

    return router


class LiveMethods:
    """The method that replicas call on each other. A deployment inherits it."""

    service: Service

    async def live_counts(self) -> dict[str, Any]:
        return counts(self.service)


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


class LiveView:
    """The counters of all replicas, at most KEPT_S old."""

    def __init__(self, service: Service) -> None:
        self._service = service
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
            answers = await self._handle.broadcast("live_counts").results_async(
                timeout_s=ANSWER_WITHIN_S, return_exceptions=True
            )
        except TimeoutError:  # one stalled replica delays the answers of all
            answers = [TimeoutError()]
        replicas = [answer for answer in answers if not isinstance(answer, BaseException)]
        return {
            "model": self._service.name,
            "latency_bounds_s": self._service.metrics.latency_s.bounds,  # upper bounds of the buckets
            "replicas": replicas or [counts(self._service)],
            "complete": len(replicas) == len(answers) > 0,  # whether all replicas answered
        }

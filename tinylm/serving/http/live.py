"""What the whole service does right now, as counters of each replica: `GET /live`, which the web page draws.

A replica that is asked asks all of them through Serve, itself included: nothing is done while nobody looks. Rates are
made by who looks twice. Prometheus' metrics are `tinylm.serving.metrics`' business.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypedDict

from fastapi import APIRouter, Request
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import JSONResponse, Response

from tinylm.serving.calls import Call, Refused
from tinylm.serving.http.completions import let_in
from tinylm.serving.http.errors import HEADERS, error_response
from tinylm.serving.service import Service

ANSWER_WITHIN_S = 2.0
KEPT_S = 0.5  # a view is shown for so long, however many look


class ReplicaCounts(TypedDict):
    """Of one replica; totals are since it started."""

    id: str
    slots: int
    running: int  # requests that hold a slot now
    waiting: int  # requests queued for one now
    requests: int  # that have ended, however they did
    tokens: int  # that the engine has made
    latency_counts: list[int]  # answers by the time they took: one bucket a bound, and one for the rest


class View(TypedDict):
    model: str
    latency_bounds_s: list[float]  # upper bounds of the buckets
    replicas: list[ReplicaCounts]
    complete: bool  # False: not all replicas answered, and only those that did are there


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    view = LiveView(service)

    @router.get("/live")
    async def live(request: Request) -> Response:
        """For those who may ask for text; no line in the log for each look."""
        try:
            let_in(Call("GET /live"), request, service)
        except Refused as error:
            return error_response(401, error.details, HEADERS[401])
        return JSONResponse(await view.look(), headers={"Cache-Control": "no-store"})

    return router


class LiveMethods:
    """For a deployment to inherit: what its replicas tell each other."""

    service: Service

    async def live_counts(self) -> ReplicaCounts:
        return counts(self.service)


def counts(service: Service) -> ReplicaCounts:
    """A replica's own."""
    engine, metrics = service.engine.engine, service.metrics
    return ReplicaCounts(
        id=service.replica,
        slots=engine.n_slots,
        running=engine.n_running,
        waiting=engine.n_waiting,
        requests=metrics.n_requests,
        tokens=int(engine.stats.batch_size.sum),
        latency_counts=metrics.latency_s.counts(),
    )


class LiveView:
    """The service as seen from one of its replicas."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._handle: DeploymentHandle[Any] | None = None
        self._lock = asyncio.Lock()
        self._view: View | None = None
        self._seen_at = 0.0

    async def look(self) -> View:
        """All replicas' counters, at most KEPT_S old."""
        async with self._lock:
            if self._view is None or time.monotonic() - self._seen_at > KEPT_S:
                self._view = await self._ask_all()
                self._seen_at = time.monotonic()
            return self._view

    async def _ask_all(self) -> View:
        if self._handle is None:
            context = serve.get_replica_context()
            self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            answers = await self._handle.broadcast("live_counts").results_async(
                timeout_s=ANSWER_WITHIN_S, return_exceptions=True
            )
        except TimeoutError:  # a replica that hangs keeps the others' answers back
            answers = [TimeoutError()]
        replicas: list[ReplicaCounts] = [answer for answer in answers if not isinstance(answer, BaseException)]
        return View(
            model=self._service.name,
            latency_bounds_s=list(self._service.metrics.latency_s.bounds),
            replicas=replicas or [counts(self._service)],
            complete=len(replicas) == len(answers) > 0,
        )

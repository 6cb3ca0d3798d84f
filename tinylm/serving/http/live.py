"""The state of the whole service now, for the web page.

`GET /live` returns the counters of each replica. They are totals, and the page computes rates from two answers.
`GET /explain/batch` returns the last steps of each replica's engine.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from tinylm.serving.calls import Call, Refused
from tinylm.serving.http.completions import check_access
from tinylm.serving.http.errors import HEADERS, error_response
from tinylm.serving.live import AllReplicas
from tinylm.serving.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def answer(request: Request, replicas: AllReplicas, more: dict[str, Any]) -> Response:
        """Return the view to callers with access. These requests are not logged."""
        try:
            check_access(Call(f"GET {request.url.path}"), request, service)
        except Refused as error:
            return error_response(401, error.details, HEADERS[401])
        return JSONResponse({**more, **await replicas.get()}, headers={"Cache-Control": "no-store"})

    @router.get("/live")
    async def live(request: Request) -> Response:
        bounds = service.metrics.latency_s.bounds  # upper bounds of the buckets
        return await answer(request, service.counts, {"model": service.name, "latency_bounds_s": bounds})

    @router.get("/explain/batch")
    async def batch(request: Request) -> Response:
        return await answer(request, service.steps, {"model": service.name})

    return router

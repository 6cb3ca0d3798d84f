"""The standard health service (grpc.health.v1.Health) on a Serve deployment: `Check`, `List` and `Watch`.

It does not decide whether Serve replaces a replica. The deployment's `check_health` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

from tinylm.serving.ray.internals import is_draining

SERVICES = ("", "tinylm.v1.TinyLM")  # "" means the whole server
LOOK_AGAIN_S = 0.25
MAX_WATCHING = 32  # open Watch streams a replica; they need no key and never end
Status = health_pb2.HealthCheckResponse.ServingStatus


class HealthMethods:
    """The methods of the health service. A deployment inherits them and defines `_is_healthy`."""

    _is_healthy: Callable[[], bool]
    _n_watching = 0

    def _serving_status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        return Status.SERVING if self._is_healthy() and not is_draining() else Status.NOT_SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the status now. The call needs no key, and no load makes it fail."""
        if request.service not in SERVICES:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(f"unknown service {request.service!r}")
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=self._serving_status())

    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthListResponse:
        """Return the status of every service now. Like `Check`, the call needs no key."""
        status = health_pb2.HealthCheckResponse(status=self._serving_status())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(SERVICES, status))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """Send the status now and at each change. End the stream when the replica shuts down.

        Refuse more than MAX_WATCHING streams: each occupies one of the calls that Serve allows a replica.
        """
        if self._n_watching >= MAX_WATCHING:
            grpc_context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            grpc_context.set_details(f"{MAX_WATCHING} streams watch this replica, the limit: use Check")
            yield health_pb2.HealthCheckResponse()  # the Python proxy sends a status only with a message
            return
        self._n_watching += 1
        try:
            last = None
            while True:
                status = self._serving_status() if request.service in SERVICES else Status.SERVICE_UNKNOWN
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                if is_draining():
                    return
                await asyncio.sleep(LOOK_AGAIN_S)
        finally:
            self._n_watching -= 1

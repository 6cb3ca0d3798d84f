"""grpc.health.v1.Health on a Serve deployment: `Check`, `Watch`, and whether the replica is being taken down.

Whether Serve replaces a replica is decided by the deployment's own `check_health`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
import ray
from grpc_health.v1 import health_pb2
from ray.serve.grpc_util import RayServegRPCContext

SERVICES = ("", "tinylm.v1.TinyLM")  # "" is the server as a whole
LOOK_AGAIN_S = 0.25
MAX_WATCHING = 32  # streams at once that a replica gives its status to, without a key and without end
Status = health_pb2.HealthCheckResponse.ServingStatus


def is_draining() -> bool:
    """Whether Serve has begun to shut this replica down: it finishes what it has and gets nothing new.

    Serve tells HAProxy and the controller, and the deployment only when the draining is over; so this looks at the
    actor itself, whose name for it is internal to Ray 2.60. Elsewhere than in a replica it is False.
    """
    worker = ray._private.worker.global_worker
    actor = worker.actors.get(getattr(worker, "actor_id", None))
    return bool(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False))


class HealthMethods:
    """The methods of the health service, for a deployment to inherit; `_is_healthy` is asked each time."""

    _is_healthy: Callable[[], bool]
    _n_watching = 0

    def _serving_status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        return Status.SERVING if self._is_healthy() and not is_draining() else Status.NOT_SERVING

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """Never refused, whatever the load and without a key."""
        if request.service not in SERVICES:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            grpc_context.set_details(f"unknown service {request.service!r}")
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=self._serving_status())

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The status now and at each change. The stream ends when the replica is taken down, which it would hold up.

        With MAX_WATCHING open already it is refused: each takes one of the calls that Serve lets a replica have.
        """
        if self._n_watching >= MAX_WATCHING:
            grpc_context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            grpc_context.set_details(f"{MAX_WATCHING} streams watch this replica, the limit: ask with Check")
            yield health_pb2.HealthCheckResponse()  # the Python proxy takes the status from a message alone
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

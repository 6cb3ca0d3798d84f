"""The standard health service of a replica."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2

from tinylm.serving.grpc.health import MAX_WATCHING, HealthMethods

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Context:
    """Records the status of a call."""

    code = grpc.StatusCode.OK

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        pass


class Replica(HealthMethods):
    healthy = True

    def _is_healthy(self) -> bool:
        return self.healthy


def test_check_reports_health_and_unknown_services() -> None:
    replica, context, unknown = Replica(), Context(), Context()

    async def check(service: str, context: Context) -> int:
        return (await replica.Check(health_pb2.HealthCheckRequest(service=service), context)).status

    assert asyncio.run(check("", context)) == asyncio.run(check("tinylm.v1.TinyLM", context)) == SERVING
    replica.healthy = False
    assert asyncio.run(check("", context)) == NOT_SERVING
    asyncio.run(check("another", unknown))
    assert (context.code, unknown.code) == (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)


def test_watch_reports_changes_and_limits_its_streams() -> None:
    async def watch() -> None:
        replica, refused = Replica(), Context()
        streams = [replica.Watch(health_pb2.HealthCheckRequest(), Context()) for _ in range(MAX_WATCHING)]
        assert {(await anext(stream)).status for stream in streams} == {SERVING}
        await anext(replica.Watch(health_pb2.HealthCheckRequest(), refused))
        assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        replica.healthy = False
        assert (await anext(streams[0])).status == NOT_SERVING
        for stream in streams:
            await stream.aclose()
        assert (await anext(replica.Watch(health_pb2.HealthCheckRequest(), Context()))).status == NOT_SERVING

    asyncio.run(watch())

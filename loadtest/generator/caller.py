"""The interface of a protocol. Each protocol is a module beside this one."""

from __future__ import annotations

from typing import Protocol

from loadtest.generator.call_record import CallRecord
from loadtest.generator.workload import Request
from loadtest.load import Load


class Caller(Protocol):
    """Connections to the measured server. Create it inside the event loop that uses it."""

    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        """Make one call on the connection with this number. Fill in all of `record` except sent_at and ended_at.

        A failed call gets its status in `record`: this method neither raises nor retries.
        """

    async def close(self) -> None: ...


async def connect(load: Load) -> Caller:
    """Return a caller for the protocol of `load.server`. Import only the module of that protocol."""
    if load.protocol == "openai":
        from loadtest.generator.openai_caller import OpenAICaller

        return OpenAICaller(load)
    if load.protocol == "engine":
        from loadtest.generator.engine_caller import EngineCaller

        return EngineCaller(load)
    from loadtest.generator.grpc_caller import GrpcCaller

    caller = GrpcCaller(load)
    await caller.wait_until_connected()
    return caller

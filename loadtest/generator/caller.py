"""What the loops need of a protocol. Each protocol is a module beside this one."""

from __future__ import annotations

from typing import Protocol

from loadtest.generator.call_record import CallRecord
from loadtest.generator.workload import Request
from loadtest.load import Load


class Caller(Protocol):
    """Connections to the measured server. Create it inside the event loop that uses it."""

    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        """Make one call on the connection of that number, and fill in all of `record` but sent_at and ended_at.

        A failed call gets its status. It raises nothing and is not retried.
        """

    async def close(self) -> None: ...


async def connect(load: Load) -> Caller:
    """Return a caller for the protocol of `load.server`. A protocol is imported only when it is used."""
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

"""What the loops need of a protocol: something that answers one request. Each protocol is a file beside this one."""

from __future__ import annotations

from typing import Protocol

from loadtest.load import Load
from loadtest.records import Call
from loadtest.workload import Ask


class Caller(Protocol):
    """Connections to what is measured. Made inside the event loop that uses it."""

    async def ask(self, ask: Ask, call: Call, connection: int) -> None:
        """Make one call on the connection of that number and fill `call` in, but for its times of sending and ending.

        A call that fails gets its status; nothing is raised, and nothing is asked again.
        """

    async def close(self) -> None: ...


async def connect(load: Load) -> Caller:
    """The caller for the protocol of `load.server`."""
    if load.protocol == "openai":
        from loadtest.client.openai_caller import OpenAICaller

        return OpenAICaller(load)
    if load.protocol == "engine":
        from loadtest.client.engine_caller import EngineCaller

        return EngineCaller(load)
    from loadtest.client.grpc_caller import GrpcCaller

    caller = GrpcCaller(load)
    await caller.wait_until_connected()
    return caller

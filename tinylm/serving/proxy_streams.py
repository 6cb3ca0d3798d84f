"""Makes Serve's Python gRPC proxy hand on every cancellation of a stream.

The proxy cancels the replica's work only if the client leaves while the proxy waits for the replica. If it leaves while
a message is being written, some one in twenty times, the replica goes on to the end of the answer for nobody. Here a
task of its own reads from the replica and never waits for the client, so that cancelling it always arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.serve._private.proxy_request_response import gRPCStreamingType

_END = object()


def hand_on_cancellations(server: Any) -> None:
    """For the proxy's server, before it has services."""
    make_handler = server.service_handler_factory

    def make(service_method: str, streaming_type: gRPCStreamingType) -> Callable:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        return _pumped(handler) if streaming_type is gRPCStreamingType.UNARY_STREAM else handler

    server.service_handler_factory = make


class _Context:
    """A call's context that may be asked who called after the call is over: gRPC's own crashes the process then."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _pumped(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue = asyncio.Queue()  # bounded by the model's context: a message has a token at least

        async def pump() -> None:
            try:
                async for message in handler(request, _Context(context)):
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(_END)

        task = asyncio.create_task(pump())
        try:
            while (message := await messages.get()) is not _END:
                yield message
            await task  # its error, should it have ended in one
        finally:  # also where gRPC drops this generator in the middle of a write
            task.cancel()

    return unary_stream

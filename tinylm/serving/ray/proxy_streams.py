"""Make Serve's Python gRPC proxy pass on every cancellation of a stream.

The proxy cancels the replica's work only when the client leaves while the proxy waits for the replica. When the client
leaves while the proxy writes a message (about one case in twenty), the replica generates the whole answer for nothing.
Here, a separate task reads from the replica and never waits for the client. Cancelling that task always works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from tinylm.serving.ray.internals import wrap_handlers

_END = object()


def hand_on_cancellations(server: Any) -> None:
    """Change the stream handlers of the proxy's server. Call it before the server has any service."""
    wrap_handlers(server, {"unary_stream": _pumped})


class _Context:
    """A call's context whose `peer` may be asked after the call. gRPC's own context then crashes the process."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _pumped(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable[..., Any]:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue[Any] = asyncio.Queue()  # bounded by the context: a message has at least one token

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
            await task  # raises the error of the task, if there was one
        finally:  # also when gRPC drops this generator during a write
            task.cancel()

    return unary_stream

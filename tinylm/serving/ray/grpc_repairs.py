"""Repair two faults of Serve's gRPC servers. Each repair wraps the handlers that Serve makes.

`forward_cancellations` is for Serve's Python proxy, and `fail_in_one_frame` for the server in each replica. Call them
before the server has any service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from tinylm.serving.ray.internals import wrap_handlers

_END = object()


def forward_cancellations(server: Any) -> None:
    """Make the Python proxy forward every cancellation of a stream to the replica.

    The proxy itself does so only if the client leaves while the proxy waits for the replica. If the client leaves while
    the proxy writes a message (about one case in twenty), the replica generates the rest of the answer in vain. Here a
    separate task reads from the replica and never waits for the client, so it can always be cancelled.
    """
    wrap_handlers(server, {"unary_stream": _read_in_task})


def fail_in_one_frame(server: Any) -> None:
    """Make a replica send a failed call as one frame of headers, which gRPC calls a Trailers-Only response.

    Serve's handlers set the status and return, so the server sends headers first and the status in a second frame.
    HAProxy sees no status in a second frame, so it cannot see that a replica is full (see `haproxy`). `context.abort`
    puts everything into one frame.
    """
    wrap_handlers(server, {"unary_unary": _unary_with_abort, "unary_stream": _stream_with_abort})


class _Context:
    """A call's context whose `peer` works after the call. With gRPC's own context that crashes the process."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._peer = context.peer()

    def peer(self) -> str:
        return self._peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _read_in_task(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable[..., Any]:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        messages: asyncio.Queue[Any] = asyncio.Queue()  # bounded by the context: a message has at least one token

        async def read() -> None:
            try:
                async for message in handler(request, _Context(context)):
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(_END)

        task = asyncio.create_task(read())
        try:
            while (message := await messages.get()) is not _END:
                yield message
            await task  # raises the task's error
        finally:  # also runs when gRPC drops this generator during a write
            task.cancel()

    return unary_stream


def _unary_with_abort(handler: Callable[[Any, Any], Awaitable[bytes]]) -> Callable[..., Any]:
    async def unary_unary(request: Any, context: Any) -> bytes:
        response = await handler(request, context)
        del request  # an aborted call keeps this frame, and its variables, until a garbage collection
        await _abort_if_failed(context)
        return response

    return unary_unary


def _stream_with_abort(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable[..., Any]:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        has_begun = False
        async with aclosing(handler(request, context)) as messages:
            async for message in messages:
                if message:  # an empty message only carries a status through the Python proxy
                    has_begun = True
                    yield message
        del request, messages
        if not has_begun:
            await _abort_if_failed(context)

    return unary_stream


async def _abort_if_failed(context: Any) -> None:
    if context.code() not in (None, 0, grpc.StatusCode.OK):  # gRPC sets 0, Serve sets OK
        await context.abort(context.code(), context.details(), context.trailing_metadata())

"""Make a replica's gRPC server answer a failed call in one frame of headers.

gRPC calls this a Trailers-Only response. Serve's handlers set the status and return. The server then sends headers,
and the status in a second frame. HAProxy does not see a status in a second frame, so it cannot see that a replica is
full (see `haproxy`). `context.abort` puts everything into one frame.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from tinylm.serving.ray.internals import wrap_handlers


def fail_by_headers_alone(server: Any) -> None:
    """Change the handlers of a replica's server. Call it before the server has any service."""
    wrap_handlers(server, {"unary_unary": _unary, "unary_stream": _stream})


def _unary(handler: Callable[[Any, Any], Awaitable[bytes]]) -> Callable[..., Any]:
    async def unary_unary(request: Any, context: Any) -> bytes:
        response = await handler(request, context)
        del request  # an aborted call keeps this frame, and what it holds, until a garbage collection
        await _abort_if_failed(context)
        return response

    return unary_unary


def _stream(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable[..., Any]:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        has_begun = False
        async with aclosing(handler(request, context)) as messages:
            async for message in messages:
                if message:  # an empty message carries a status through the Python proxy, which is not used here
                    has_begun = True
                    yield message
        del request, messages
        if not has_begun:
            await _abort_if_failed(context)

    return unary_stream


async def _abort_if_failed(context: Any) -> None:
    if context.code() not in (None, 0, grpc.StatusCode.OK):  # gRPC sets 0, Serve sets OK
        await context.abort(context.code(), context.details(), context.trailing_metadata())

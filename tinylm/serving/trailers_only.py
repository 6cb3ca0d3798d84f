"""Makes a replica's gRPC server answer a call that fails before its first message by headers alone.

gRPC calls that a Trailers-Only response. Serve's handlers set the status and return, whereupon the server sends
headers, and the status in trailers after them, where HAProxy can't see it (nor that a replica has no room, see
`haproxy`). Ending the call by `abort` puts all of it into one frame of headers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from ray.serve._private.proxy_request_response import gRPCStreamingType


def fail_by_headers_alone(server: Any) -> None:
    """For a replica's server that has no services yet."""
    make_handler = server.service_handler_factory

    def make(service_method: str, streaming_type: gRPCStreamingType) -> Callable:
        handler = make_handler(service_method=service_method, streaming_type=streaming_type)
        match streaming_type:
            case gRPCStreamingType.UNARY_UNARY:
                return _unary(handler)
            case gRPCStreamingType.UNARY_STREAM:
                return _stream(handler)
        return handler

    server.service_handler_factory = make


def _unary(handler: Callable[[Any, Any], Awaitable[bytes]]) -> Callable:
    async def unary_unary(request: Any, context: Any) -> bytes:
        response = await handler(request, context)
        del request  # an aborted call waits for a garbage collection with all that this frame holds
        await _abort_if_failed(context)
        return response

    return unary_unary


def _stream(handler: Callable[[Any, Any], AsyncGenerator[bytes, None]]) -> Callable:
    async def unary_stream(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        is_begun = False
        async with aclosing(handler(request, context)) as messages:
            async for message in messages:
                if message:  # an empty one carries a failure's status through the Python proxy, which this is not
                    is_begun = True
                    yield message
        del request, messages
        if not is_begun:
            await _abort_if_failed(context)

    return unary_stream


async def _abort_if_failed(context: Any) -> None:
    if context.code() not in (None, 0, grpc.StatusCode.OK):  # gRPC's number for it, or what Serve set
        await context.abort(context.code(), context.details(), context.trailing_metadata())

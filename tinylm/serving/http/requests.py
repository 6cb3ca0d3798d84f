"""Read the body of an HTTP request. `tinylm.completions.requests` checks what it asks for."""

from __future__ import annotations

from fastapi import Request

MAX_BODY_BYTES = 4 * 1024 * 1024  # the same limit as for a gRPC message


class TooLarge(ValueError):
    """The request has more than MAX_BODY_BYTES."""


async def read_body(request: Request) -> bytes:
    """Return the body of a request. Raise TooLarge, or ValueError unless its content type is JSON.

    The check of the content type stops foreign web pages. A browser sends their requests of other types without
    asking, but a request with JSON only after the server has permitted it.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ValueError(f"content-type is {media_type!r}: it must be application/json")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise TooLarge(f"the request has {declared} bytes: it must have at most {MAX_BODY_BYTES}")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"the request has too many bytes: it must have at most {MAX_BODY_BYTES}")
        chunks.append(chunk)
    return b"".join(chunks)

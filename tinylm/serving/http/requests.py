"""Read the body of an HTTP request. `tinylm.completions.requests` checks what it asks for."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from tinylm.completions.requests import message_of
from tinylm.system.json_text import parse_json

Body = TypeVar("Body", bound=BaseModel)

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


async def read_fields(request: Request, kind: type[Body]) -> Body:
    """Return the checked body of a request. Raise ValueError that names the wrong field, or as `read_body`."""
    try:
        return kind.model_validate(parse_json(await read_body(request), "the request"))
    except ValidationError as error:
        raise ValueError(message_of(error)) from None

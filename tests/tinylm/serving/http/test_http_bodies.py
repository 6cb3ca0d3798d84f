"""Which bodies of HTTP requests are read."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from starlette.requests import Request

from tinylm.serving.calls import Call
from tinylm.serving.http.errors import error_of
from tinylm.serving.http.requests import MAX_BODY_BYTES, TooLarge, read_body


def body_of(content_type: str, *chunks: bytes, declared: int | None = None) -> bytes:
    """Return what `read_body` returns for a request with this body."""
    headers = [(b"content-type", content_type.encode())]
    if declared is not None:
        headers.append((b"content-length", str(declared).encode()))
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict:
        return messages.pop(0)

    return asyncio.run(read_body(Request({"type": "http", "headers": headers}, receive)))


def test_a_body_of_json_is_read() -> None:
    assert body_of("application/json; charset=utf-8", b"{", b"}", declared=2) == b"{}"


def test_a_body_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'text/plain': it must be application/json"):
        body_of("text/plain", b"{}")


def test_a_body_that_is_too_large_is_refused() -> None:
    with pytest.raises(TooLarge, match=str(MAX_BODY_BYTES)):
        body_of("application/json", b" " * (MAX_BODY_BYTES + 1))
    with pytest.raises(TooLarge, match=str(MAX_BODY_BYTES)):
        body_of("application/json", declared=MAX_BODY_BYTES + 1)
    call = Call("POST /v1/completions", status=grpc.StatusCode.INVALID_ARGUMENT, error=TooLarge("too large"))
    status, body = error_of(call)
    assert (status, body["error"]["code"]) == (413, "request_too_large")

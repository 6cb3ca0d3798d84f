"""The HTTP status for each gRPC status, and responses with an error in the form of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import grpc
from starlette.responses import JSONResponse

from tinylm.completions.errors import error_body
from tinylm.serving.calls import Busy, Call, RateLimited, Refused
from tinylm.serving.http.requests import TooLarge

Code = grpc.StatusCode
STATUSES: dict[grpc.StatusCode, int] = {
    Code.INVALID_ARGUMENT: 400,
    Code.UNAUTHENTICATED: 401,
    Code.NOT_FOUND: 404,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
}
HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}


def error_of(call: Call) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body for a call that failed."""
    if isinstance(call.error, TooLarge):
        return 413, error_body(413, call.details)
    status = STATUSES.get(call.status, 500)
    body = error_body(status, call.details)
    if isinstance(call.error, RateLimited):  # OpenAI's type is the kind of limit
        body["error"] |= {"type": call.error.kind, "code": "rate_limit_exceeded"}
    elif isinstance(call.error, Busy):
        body["error"]["code"] = "busy"
    return status, body


def refused(call: Call) -> JSONResponse:
    """Return the response to a call that failed before its first text."""
    status, body = error_of(call)
    headers = HEADERS.get(status)
    if isinstance(call.error, Refused) and call.error.retry_after_s is not None:
        headers = {"retry-after": str(math.ceil(call.error.retry_after_s))}  # whole seconds (RFC 9110, 10.2.3)
    return JSONResponse(body, status, headers)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error response that belongs to no `Call`."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)

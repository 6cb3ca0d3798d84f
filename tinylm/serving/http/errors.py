"""Errors in the form of OpenAI's API, and the HTTP status for each gRPC status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import grpc
from starlette.responses import JSONResponse

from tinylm.serving.calls import Call, RateLimited
from tinylm.serving.http.requests import TooLarge, is_field

Code = grpc.StatusCode
# HTTP status, and OpenAI's type and code of the error.
STATUSES: dict[grpc.StatusCode, tuple[int, str, str | None]] = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error", None),
    Code.UNAUTHENTICATED: (401, "invalid_request_error", "invalid_api_key"),
    Code.NOT_FOUND: (404, "invalid_request_error", "model_not_found"),
    Code.RESOURCE_EXHAUSTED: (429, "server_error", "queue_full"),
    Code.INTERNAL: (500, "server_error", None),
    Code.UNAVAILABLE: (503, "server_error", "service_unavailable"),
    Code.DEADLINE_EXCEEDED: (504, "server_error", "timeout"),
}
HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "1"}}


def error_of(call: Call) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body for a call that failed."""
    status, kind, code = STATUSES.get(call.status, STATUSES[Code.INTERNAL])
    if isinstance(call.error, TooLarge):
        status, code = 413, "request_too_large"
    elif isinstance(call.error, RateLimited):  # OpenAI's type is the kind of limit
        kind, code = call.error.kind, "rate_limit_exceeded"
    word = call.details.partition(" ")[0]  # the message about a field begins with its name
    param = word if status in (400, 404) and is_field(word) else None
    return status, {"error": {"message": call.details, "type": kind, "param": param, "code": code}}


def refused(call: Call) -> JSONResponse:
    """Return the response to a call that failed before its first text."""
    status, body = error_of(call)
    headers = HEADERS.get(status)
    if isinstance(call.error, RateLimited):
        headers = {"retry-after": str(math.ceil(call.error.retry_after_s))}  # whole seconds (RFC 9110, 10.2.3)
    return JSONResponse(body, status, headers)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error response that belongs to no `Call`."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)

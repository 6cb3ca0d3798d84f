"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from tinylm.completions.requests import is_field

# HTTP status -> OpenAI's type and code of the error.
KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("server_error", "queue_full"),
    500: ("server_error", None),
    503: ("server_error", "service_unavailable"),
    504: ("server_error", "timeout"),
}


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return the body for a request that failed. The message about a field begins with the field's name."""
    kind, code = KINDS[status]
    word = message.partition(" ")[0]
    param = word if status in (400, 404) and is_field(word) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def timeout_message(timeout_ms: int, n_tokens: int) -> str:
    """Return the message for an answer that had only `n_tokens` tokens when its time limit passed."""
    return f"timeout_ms is {timeout_ms}: the time limit passed after {n_tokens} tokens of the answer"

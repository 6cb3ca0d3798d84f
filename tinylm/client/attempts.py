"""Decide when to retry a call, and which error the caller gets."""

from __future__ import annotations

import random
import time
from typing import Any

import grpc

from tinylm.client.wire import retry_after_s

# The caller may get these when a replica or the proxy dies during a call.
RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.NOT_FOUND,  # from a proxy that has just started and does not know the application yet
    }
)
FIRST_PAUSE_S = 0.1  # before the first retry; each further pause is twice as long
CUT_OFF = (grpc.StatusCode.UNAVAILABLE, "the answer ended before its last message")


class ServiceError(RuntimeError):
    """The service refused or failed a call, or no service answered. The message says what helps.

    code: the gRPC status. attempts: how often the call was sent. retry_after_s: for a call that a limit of its key
    refused, the seconds until the limit admits it; for an explanation that a busy replica refused, the seconds after
    which to try again; None for every other error, such as a full queue.
    """

    def __init__(
        self, code: grpc.StatusCode, details: str, attempts: int = 1, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.attempts, self.retry_after_s = code, attempts, retry_after_s


class Attempts:
    """The attempts of one call: their number, the time that is left, and whether there is another one."""

    def __init__(self, address: str, timeout_s: float | None, retries: int) -> None:
        self.n = 0
        self._address, self._timeout_s, self._retries = address, timeout_s, retries
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s

    def begin(self) -> float | None:
        """Count another attempt. Return the seconds that it may take, None without a limit."""
        self.n += 1
        return None if self._timeout_s is None else max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: Any, has_begun: bool = False) -> float:
        """Return the seconds to wait before the next attempt, after one that failed with an error of gRPC.

        Raise as `pause_s` does.
        """
        return self.pause_s(error.code(), error.details(), has_begun, retry_after_s(error.trailing_metadata()))

    def pause_s(
        self, code: grpc.StatusCode, details: str | None, has_begun: bool = False, named_s: float | None = None
    ) -> float:
        """Return the seconds to wait before the next attempt, after one that failed with `code`.

        named_s: the seconds that the service asks to wait, if it named a time.
        Raise the error for the caller if there is no next attempt: the answer has begun, a dying replica does not give
        such a status and the service named no time, or no retries or no time are left.
        """
        backoff_s = random.uniform(0.5, 1.0) * FIRST_PAUSE_S * 2 ** (self.n - 1)
        pause_s = backoff_s if named_s is None else max(0.0, named_s)
        in_time = time.monotonic() + pause_s < self._deadline
        if (code in RETRIED or named_s is not None) and not has_begun and self.n <= self._retries and in_time:
            return pause_s
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            raise ValueError(details) from None
        raise ServiceError(code, self._explained(code, details or "no details given"), self.n, named_s) from None

    def _explained(self, code: grpc.StatusCode, details: str) -> str:
        """Return the service's message and a hint for the caller."""
        match code:
            case grpc.StatusCode.UNAVAILABLE:
                times = f", sent {self.n} times" if self.n > 1 else ""
                return f"{details} (from {self._address}{times})"
            case grpc.StatusCode.UNAUTHENTICATED:
                return f"{details} (set the key with api_key or TINYLM_API_KEY)"
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"{details} (from {self._address}; timeout_s is {self._timeout_s})"
            case grpc.StatusCode.UNIMPLEMENTED | grpc.StatusCode.NOT_FOUND:
                return f"{details} (check that TinyLM is served at {self._address})"
            case _:
                return details

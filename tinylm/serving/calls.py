"""Follow a call from its arrival to its end: its status, and its line in the log.

A status is gRPC's, also for a call over HTTP. `tinylm.serving.metrics` counts calls.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from tinylm.completions.errors import timeout_message
from tinylm.engine import EngineFull
from tinylm.engine.async_engine import EngineDied, Listener
from tinylm.engine.completion import Completion
from tinylm.engine.request import Progress
from tinylm.serving.keys import Key
from tinylm.serving.limits import Kind, Refusal
from tinylm.serving.trace_context import TraceContext

if TYPE_CHECKING:
    from tinylm.serving.ray.shared_limits import Reservation

logger = logging.getLogger("ray.serve")
_ENDINGS = ("stop", "length", "timeout")  # a call with several answers takes the last of these


class Refused(Exception):
    """End a call with a status instead of an answer."""

    retry_after_s: float | None = None  # the time after which the caller may try again, if the refusal names one

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details

    @classmethod
    def timeout(cls, timeout_ms: int, n_tokens: int) -> Refused:
        """Return the refusal of an unstreamed answer that had only `n_tokens` tokens when its time limit passed."""
        return cls(grpc.StatusCode.DEADLINE_EXCEEDED, timeout_message(timeout_ms, n_tokens))


class RateLimited(Refused):
    """A limit of the caller's key refuses the call. `retry_after_s` is the time until it would admit the call."""

    def __init__(self, name: str, refusal: Refusal) -> None:
        self.kind: Kind = refusal.kind
        self.retry_after_s = refusal.wait_ns / 1e9
        super().__init__(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the key {name!r} has a limit of {refusal.limit} {refusal.kind} per minute: try again in "
            f"{math.ceil(self.retry_after_s * 10) / 10:.1f} s",
        )


class Busy(Refused):
    """Refuse an explanation, which must not slow down the requests that are served."""

    retry_after_s = 1.0

    def __init__(self, why: str) -> None:
        again = f"try again in {self.retry_after_s:.0f} s"
        super().__init__(grpc.StatusCode.UNAVAILABLE, f"no explanation now, since {why}: {again}")


@dataclass(slots=True)
class Answer:
    """One text of a call. It exists once the engine has accepted its request."""

    listener: Listener
    completion: Completion | None = None  # set when the answer is complete
    index: int = 0  # among the answers to the same prompt; only answer 0 counts the prompt's tokens

    @property
    def progress(self) -> Progress:
        """Return the last snapshot of the request. After the first token, it is at most 40 ms old."""
        assert self.listener.progress is not None  # the engine took the request
        return self.listener.progress

    @property
    def n_prompt_tokens(self) -> int:
        return self.progress.n_prompt_tokens if self.index == 0 else 0

    @property
    def n_tokens(self) -> int:
        """Return how many tokens the answer has, also if it is incomplete."""
        return len(self.progress.tokens if self.completion is None else self.completion.token_ids)


@dataclass(slots=True)
class Call:
    """The state of a call."""

    method: str
    key: Key | None = None  # the line of the caller's API key in the key file
    reservation: Reservation | None = None  # of the limits of that key, if it has limits
    trace: TraceContext | None = None  # that the caller named
    trace_id: str | None = None  # of the spans, if there are any
    prompt: str | None = None  # set only if the service logs prompts
    answers: list[Answer] = field(default_factory=list)  # answers that the engine accepted; at most one over gRPC
    n_expected: int = 1  # answers that the caller asked for
    status: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    error: Exception | None = None  # the error that ended the call
    began_at: float = field(default_factory=time.monotonic)

    @property
    def completions(self) -> list[Completion]:
        return [answer.completion for answer in self.answers if answer.completion is not None]

    @property
    def n_prompt_tokens(self) -> int:
        return sum(answer.n_prompt_tokens for answer in self.answers)

    @property
    def n_tokens(self) -> int:
        return sum(answer.n_tokens for answer in self.answers)

    @property
    def finish_reason(self) -> str | None:
        """Return how the call ended, or None if the engine accepted no answer.

        The result is "cancelled" if the client left, "error" after a fault, else an ending of its answers. Several
        answers count as one: "timeout" comes before "length", and "length" before "stop".
        """
        if not self.answers:
            return None
        completions = self.completions
        if len(completions) < self.n_expected:
            return self._failure()
        return max((completion.finish_reason for completion in completions), key=_ENDINGS.index)

    def reason_of(self, answer: Answer) -> str:
        """Return how one answer ended."""
        return self._failure() if answer.completion is None else answer.completion.finish_reason

    def _failure(self) -> str:
        return "cancelled" if self.status is grpc.StatusCode.CANCELLED else "error"

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the log line. They never contain the API key."""
        fields: dict[str, Any] = {"method": self.method, "status": self.status.name}
        if self.key is not None:
            fields["api_key_name"] = self.key.name
        if (trace_id := self.trace_id or (self.trace and self.trace.trace_id)) is not None:
            fields["trace_id"] = trace_id
        if self.answers:
            fields["finish_reason"] = self.finish_reason
            fields["prompt_tokens"] = self.n_prompt_tokens
            fields["completion_tokens"] = self.n_tokens
        if completions := self.completions:
            fields["queue_ms"] = round(min(completion.queue_s for completion in completions) * 1000, 2)
            fields["first_token_ms"] = round(min(completion.first_token_s for completion in completions) * 1000, 2)
        if self.prompt is not None:
            fields["prompt"] = self.prompt
        if self.details:
            fields["details"] = self.details
        fields["total_ms"] = round((time.monotonic() - self.began_at) * 1000, 2)
        return fields


@contextmanager
def answering(method: str, on_end: Callable[[Call], None]) -> Iterator[Call]:
    """Follow a call during the `with` block. At the end, pass it to `on_end` and log it.

    An exception in the block becomes the call's `status` and `details`, and the block ends normally. The protocol's
    code then reports them to the client. Only a cancellation is raised again.
    """
    call = Call(method)
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        call.status, call.details = status_of(error)
        # The traceback refers to the request, which can have 4 MB, and would keep it until a garbage collection.
        call.error = error.with_traceback(None)
    finally:
        try:
            on_end(call)
        finally:
            logger.info("%s %s", method, call.status.name, extra=call.log_fields())


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return code and details for the client. An unexpected error is INTERNAL, and only the log has its traceback."""
    match error:
        case Refused():
            return error.code, error.details
        case ValueError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case EngineFull():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        case EngineDied():
            return grpc.StatusCode.UNAVAILABLE, "this replica's engine has ended: try again"
        case _:
            logger.exception("unexpected error")
            return grpc.StatusCode.INTERNAL, f"unexpected error: {type(error).__name__}"

"""A call from its arrival to its end: which status it gets, and the one line that the log keeps of it.

Statuses are gRPC's, whichever protocol a call came over. What is counted of it is `tinylm.serving.metrics`' business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from tinylm.engine import EngineFull
from tinylm.engine.async_engine import EngineDied, Listener
from tinylm.engine.completion import Completion
from tinylm.engine.request import Progress

logger = logging.getLogger("ray.serve")
_ENDINGS = ("stop", "length", "timeout")  # the later say more of a call with several answers


class Refused(Exception):
    """Ends a call with a status instead of an answer."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details

    @classmethod
    def timeout(cls, timeout_ms: int, n_tokens: int) -> Refused:
        """Of an answer that was to be whole, and had so many tokens when its time was over."""
        return cls(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"timeout_ms is {timeout_ms}: it was over after {n_tokens} tokens of the answer",
        )


@dataclass(slots=True)
class Answer:
    """One text that a call asked for, from the moment the engine took it."""

    listener: Listener
    completion: Completion | None = None  # once it has ended
    index: int = 0  # among the answers to the same prompt, which is counted once

    @property
    def progress(self) -> Progress:
        """Return the last snapshot of the request, at most 40 ms old."""
        assert self.listener.progress is not None  # the engine took the request
        return self.listener.progress

    @property
    def n_prompt_tokens(self) -> int:
        return self.progress.n_prompt_tokens if self.index == 0 else 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer, or of what there was of it."""
        return len(self.progress.tokens if self.completion is None else self.completion.token_ids)


@dataclass(slots=True)
class Call:
    """What is known of a call so far."""

    method: str
    key: str | None = None  # the name of the API key that it came with
    prompt: str | None = None  # only where the service may log prompts
    answers: list[Answer] = field(default_factory=list)  # those that the engine took; over gRPC there is one
    n_expected: int = 1  # answers that it asked for
    status: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    error: Exception | None = None  # what ended it, if anything did
    began_at: float = field(default_factory=time.monotonic)

    @property
    def completions(self) -> list[Completion]:
        return [answer.completion for answer in self.answers if answer.completion is not None]

    @property
    def finish_reason(self) -> str | None:
        """How it ended: 'cancelled' if its client left, 'error' if a fault did it; None if the engine took none.

        Of several answers, the ending that says most: 'timeout' before 'length' before 'stop'.
        """
        if not self.answers:
            return None
        completions = self.completions
        if len(completions) < self.n_expected:
            return "cancelled" if self.status is grpc.StatusCode.CANCELLED else "error"
        return max((completion.finish_reason for completion in completions), key=_ENDINGS.index)

    def reason_of(self, answer: Answer) -> str:
        """How one of its answers ended."""
        if answer.completion is not None:
            return answer.completion.finish_reason
        return "cancelled" if self.status is grpc.StatusCode.CANCELLED else "error"

    def log_fields(self) -> dict[str, Any]:
        """The line of the log: no key, and no prompt unless it was set."""
        fields: dict[str, Any] = {"method": self.method, "status": self.status.name}
        if self.key is not None:
            fields["api_key_name"] = self.key
        if self.answers:
            fields["finish_reason"] = self.finish_reason
            fields["prompt_tokens"] = sum(answer.n_prompt_tokens for answer in self.answers)
            fields["completion_tokens"] = sum(answer.n_tokens for answer in self.answers)
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
    """Around the work of a call: an error inside becomes its status; its end is logged, and told to `on_end`.

    The error goes no further: after the block, whoever speaks the protocol tells the client `status` and `details`.
    """
    call = Call(method)
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        call.status, call.details = status_of(error)
        # A traceback would hold this call and all that was asked, 4 MB perhaps, until a garbage collection.
        call.error = error.with_traceback(None)
    finally:
        logger.info("%s %s", method, call.status.name, extra=call.log_fields())
        on_end(call)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Code and details for the client. What nobody foresaw is INTERNAL, its traceback in the log alone."""
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

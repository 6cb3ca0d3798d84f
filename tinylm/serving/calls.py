"""A call from its arrival to its end: which status it gets, and the one line that the log keeps of it.

What is counted of it is `tinylm.serving.metrics`' business.
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
from ray.serve.grpc_util import RayServegRPCContext

from tinylm.async_engine import EngineDied
from tinylm.completion import Completion
from tinylm.engine import EngineFull, Sequence

logger = logging.getLogger("ray.serve")


class Refused(Exception):
    """Ends a call with a status instead of an answer."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


@dataclass(slots=True)
class Call:
    """What is known of a call so far."""

    method: str
    key: str | None = None  # the name of the API key that it came with
    prompt: str | None = None  # only where the service may log prompts
    sequence: Sequence | None = None  # of the engine, once it was admitted
    completion: Completion | None = None  # once it has ended
    status: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    began_at: float = field(default_factory=time.monotonic)

    @property
    def finish_reason(self) -> str | None:
        """How the answer ended: 'cancelled' if its client left, 'error' if a fault did it; None if none had begun."""
        if self.completion is not None:
            return self.completion.finish_reason
        if self.sequence is None:
            return None
        return "cancelled" if self.status is grpc.StatusCode.CANCELLED else "error"

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer, or of what there was of it."""
        if self.completion is not None:
            return len(self.completion.token_ids)
        return 0 if self.sequence is None else len(self.sequence.tokens)

    def log_fields(self) -> dict[str, Any]:
        """The line of the log: no key, and no prompt unless it was set."""
        fields: dict[str, Any] = {"method": self.method, "status": self.status.name}
        if self.key is not None:
            fields["api_key_name"] = self.key
        if self.sequence is not None:
            fields["finish_reason"] = self.finish_reason
            fields["prompt_tokens"] = len(self.sequence.prompt)
            fields["completion_tokens"] = self.n_tokens
        if self.completion is not None:
            fields["queue_ms"] = round(self.completion.queue_s * 1000, 2)
            fields["first_token_ms"] = round(self.completion.first_token_s * 1000, 2)
        if self.prompt is not None:
            fields["prompt"] = self.prompt
        if self.details:
            fields["details"] = self.details
        fields["total_ms"] = round((time.monotonic() - self.began_at) * 1000, 2)
        return fields


@contextmanager
def answering(method: str, context: RayServegRPCContext, on_end: Callable[[Call], None]) -> Iterator[Call]:
    """Around the work of a call: an error inside becomes its status; its end is logged, and told to `on_end`.

    An exception that left the method would reach the client as INTERNAL with a traceback.
    """
    call = Call(method)
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.status = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        call.status, call.details = status_of(error)
        context.set_code(call.status)
        context.set_details(call.details)
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

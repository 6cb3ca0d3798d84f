"""The record of one call, as the client saw it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


@dataclass(slots=True)
class CallRecord:
    """One call. Times are seconds of `time.monotonic()`. In a finished run they count from its measured time."""

    turn: int  # the number of the request in the run
    wanted: int  # tokens asked for
    intended_at: float  # when the schedule wanted the call sent; in a closed loop the same as sent_at
    sent_at: float
    ended_at: float = 0.0
    status: str = "OK"  # the name of the gRPC status
    tokens: int = 0  # of the answer
    prompt_tokens: int = 0
    replica: str = ""
    text_at: list[float] = field(default_factory=list)  # streams: when each message with text arrived
    text_tokens: list[int] | None = None  # the tokens of each of these messages; None if the server does not say

    @property
    def latency_s(self) -> float:
        """Seconds from the intended time to the end."""
        return self.ended_at - self.intended_at

    def since(self, begin: float) -> CallRecord:
        """Return the record with `begin` as second 0."""
        return replace(
            self,
            intended_at=self.intended_at - begin,
            sent_at=self.sent_at - begin,
            ended_at=self.ended_at - begin,
            text_at=[at - begin for at in self.text_at],
        )

    def tokens_of_messages(self) -> np.ndarray:
        """Return (messages,): the tokens of each message with text.

        If the server does not say, the first message has one token, because servers send the first token at once. The
        other tokens are spread evenly: 7 tokens in 3 messages are 1, 3 and 3.
        """
        if self.text_tokens is not None:
            return np.array(self.text_tokens, np.int64)
        n = len(self.text_at)
        if n < 2:
            return np.full(n, max(self.tokens, 1), np.int64)
        later = np.diff(np.round(np.arange(n) * max(self.tokens - 1, 0) / (n - 1)))
        return np.concatenate([[1], later]).astype(np.int64)

"""The last steps of an engine: which requests shared them, and where their time went. Recorded while somebody watches.

A record has numbers of requests and slots, but no token.
"""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

N_KEPT = 64  # steps
WATCHED_S = 10.0  # after the last look


class Share(NamedTuple):
    """The part of one request in a step."""

    request: int  # its number, in the order in which requests got their slots
    slot: int
    tokens: int  # tokens that the step computed
    kind: Literal["prompt", "answer"]  # what the first of these tokens belongs to


class Step(NamedTuple):
    """One step. The three times add up to its duration."""

    number: int  # of the recorded steps
    began_at: float  # `time.monotonic()` seconds
    prepare_s: float  # admit requests and fill the batch
    model_s: float  # the kernels: the forward pass, and sampling
    results_s: float  # give the tokens to the requests
    n_waiting: int  # requests without a slot
    shares: tuple[Share, ...]


class StepLog:
    """The last N_KEPT recorded steps.

    Threads: only the thread that steps the engine calls `record`. Any thread may call everything else at any time.
    """

    def __init__(self) -> None:
        self._kept: list[Step | None] = [None] * N_KEPT
        self._n_recorded = 0
        self._watched_until = 0.0

    def is_watched(self, now: float) -> bool:
        return now < self._watched_until

    def watch(self) -> list[Step]:
        """Return the last recorded steps, the oldest first, and record the steps of the next WATCHED_S."""
        self._watched_until = time.monotonic() + WATCHED_S
        return sorted(step for step in self._kept.copy() if step is not None)  # by number

    def record(self, times: tuple[float, float, float, float], n_waiting: int, shares: list[Share]) -> None:
        """Keep a step in place of the oldest one.

        times: `time.monotonic()` seconds at its beginning, when the batch was filled, after the kernels, at its end.
        """
        self._n_recorded += 1
        began_at, filled_at, computed_at, ended_at = times
        durations = (filled_at - began_at, computed_at - filled_at, ended_at - computed_at)
        step = Step(self._n_recorded, began_at, *durations, n_waiting, tuple(shares))
        self._kept[self._n_recorded % N_KEPT] = step

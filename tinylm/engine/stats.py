"""Counts that an engine keeps about itself. They cost little enough for every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

# A step takes 0.4 to 2 ms, and a token takes at least one step. Times above 100 ms are faults.
STEP_BOUNDS_S = (
    0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0008, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1,
)  # fmt: skip
BATCH_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Histogram:
    """How many values fell into each bucket, as Prometheus counts them, and the exact sum of all values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: the buckets' inclusive upper bounds, ascending. One more bucket takes the values above all bounds."""
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def counts(self) -> list[int]:
        """Return how many values are in each bucket."""
        return self._counts.copy()

    def cumulative(self) -> list[int]:
        """Return how many values were at most each bound. The last number counts all values."""
        return list(accumulate(self.counts()))


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since its creation.

    Threads: only the thread that steps the engine writes. Other threads may read at any time. Each number is right, but
    two numbers may belong to two successive steps.
    """

    step_s: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS_S))  # of every step
    batch_size: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))  # requests that a step gave a token
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS_S))  # from each token to the next
    n_admitted: int = 0  # requests that got a slot
    n_prompt_tokens: int = 0  # of admitted requests
    n_reused_tokens: int = 0  # the part of these that was in the cache

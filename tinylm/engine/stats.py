"""Counts that an engine keeps of itself, cheap enough for every step. How they are exported is other modules' business.

One thread writes; others may read at any time, and see counts that are at most one step apart from each other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

# Upper bounds. A step takes 0.4 to 2 ms, a token no less; what is beyond 100 ms is a fault, however far.
STEP_BOUNDS_S = (
    0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0008, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1,
)  # fmt: skip
BATCH_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Histogram:
    """How many values fell into each bucket, as Prometheus counts them, and the exact sum of all values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: the buckets' upper bounds, ascending, each part of its bucket; one more bucket takes the rest."""
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def counts(self) -> list[int]:
        """How many values are in each bucket, the last of which is beyond all bounds."""
        return self._counts.copy()

    def cumulative(self) -> list[int]:
        """How many values were at most each bound; the last number is that of all values."""
        return list(accumulate(self._counts.copy()))


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was made."""

    step_s: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS_S))  # of every step
    batch_size: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS))  # sequences that a step gave a token
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(STEP_BOUNDS_S))  # from a token to the next
    n_prompt_tokens: int = 0  # of sequences that were admitted
    n_reused_tokens: int = 0  # those of them whose keys and values were there already

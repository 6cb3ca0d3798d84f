"""Durations in HdrHistograms: from a microsecond to an hour, with three significant digits.

A histogram keeps each value with a relative error of at most 0.1 %, in a few kilobytes. Two histograms can be added. So
a result file holds whole distributions, not only a few percentiles.
"""

from __future__ import annotations

import numpy as np
from hdrh.histogram import HdrHistogram

LOWEST_US, HIGHEST_US, DIGITS = 1, 3_600_000_000, 3
PERCENTILES = (50, 90, 95, 99, 99.9)


def of_seconds(values: np.ndarray, counts: np.ndarray | None = None) -> HdrHistogram:
    """Return a histogram of durations (n,), each counted `counts` (n,) times, or once."""
    histogram = HdrHistogram(LOWEST_US, HIGHEST_US, DIGITS)
    micros = np.clip(np.round(values * 1e6), LOWEST_US, HIGHEST_US).astype(np.int64)
    distinct, index = np.unique(micros, return_inverse=True)
    totals: np.ndarray = np.bincount(index, weights=counts, minlength=len(distinct))
    for value, count in zip(distinct.tolist(), totals, strict=True):
        if count:
            histogram.record_value(value, int(count))
    return histogram


def figures(histogram: HdrHistogram) -> dict[str, float]:
    """Return mean, percentiles and maximum in milliseconds, or {} for an empty histogram."""
    if not histogram.get_total_count():
        return {}
    durations, counts = recorded(histogram)
    # The nearest rank: the library's own percentiles round it down, which flatters short runs.
    ranks = np.maximum(np.ceil(np.array(PERCENTILES) / 100 * counts.sum() - 1e-9), 1)
    found = durations[np.searchsorted(np.cumsum(counts), ranks)]
    values = {"mean": float(np.average(durations, weights=counts))}
    values |= {f"p{p:g}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
    values["max"] = float(durations[-1])
    return {name: round(value, 3) for name, value in values.items()}


def recorded(histogram: HdrHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Return (milliseconds, counts) of the filled buckets, ascending. A bucket stands for its highest value."""
    counts = np.array(histogram.counts)  # the iterators of the library are slower
    (filled,) = np.nonzero(counts)
    values = [histogram.get_highest_equivalent_value(histogram.get_value_from_index(int(i))) for i in filled]
    return np.array(values) / 1000, counts[filled]

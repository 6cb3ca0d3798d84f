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
    buckets, counts = recorded(histogram)
    found = percentiles(histogram, np.array(PERCENTILES) / 100)
    values = {"mean": float(np.average(buckets, weights=counts))}
    values |= {f"p{p:g}": value for p, value in zip(PERCENTILES, found.tolist(), strict=True)}
    values["max"] = float(buckets[-1])
    return {name: round(value, 3) for name, value in values.items()}


def percentiles(histogram: HdrHistogram, shares: np.ndarray) -> np.ndarray:
    """Return (n,) milliseconds that these shares (n,) of the durations do not exceed, by nearest rank."""
    values, counts = recorded(histogram)
    ranks = np.maximum(np.ceil(shares * counts.sum() - 1e-9), 1)
    found: np.ndarray = values[np.searchsorted(np.cumsum(counts), ranks)]
    return found


def curve(histogram: HdrHistogram, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return (shares, milliseconds) of percentiles that are evenly spaced in log(1 / (1 - share))."""
    total = histogram.get_total_count()
    if not total:
        return np.empty(0), np.empty(0)
    shares = 1 - np.logspace(0, -np.log10(max(total, 2)), points)
    return shares, percentiles(histogram, shares)


def recorded(histogram: HdrHistogram) -> tuple[np.ndarray, np.ndarray]:
    """Return (milliseconds, counts) of the filled buckets, ascending. A bucket stands for its highest value."""
    counts = np.array(histogram.counts)  # the iterators of the library take a hundred times as long
    (filled,) = np.nonzero(counts)
    values = [histogram.get_highest_equivalent_value(histogram.get_value_from_index(int(i))) for i in filled]
    return np.array(values) / 1000, counts[filled]


def encode(histogram: HdrHistogram) -> str:
    """Return the compressed base64 form of HdrHistogram, which its implementations in other languages read too."""
    text: str = histogram.encode().decode()
    return text


def decode(text: str) -> HdrHistogram:
    return HdrHistogram.decode(text)

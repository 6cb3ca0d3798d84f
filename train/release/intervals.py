"""Confidence intervals of a ratio of sums, by resampling the sources of the parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2000
CONFIDENCE = 0.95
BATCH = 100  # resamples in memory at once


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    sources: Sequence[str],
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Return (low, high) of sum(numerators) / sum(denominators): the percentile bootstrap over sources (Efron 1979).

    The arguments have one entry per part. Parts with the same source, such as the chapters of a book, are drawn
    together, because they are alike. With few sources the interval is too narrow, and with one source it has no width.
    The same arguments give the same interval. Raises ValueError when a denominator is not above 0.
    """
    if not min(denominators) > 0:
        raise ValueError(f"denominators has {min(denominators)}: each must be above 0")
    _, source = np.unique(np.asarray(sources, str), return_inverse=True)
    above, below = np.bincount(source, numerators), np.bincount(source, denominators)  # (S,) sums by source
    if len(above) == 1:
        return float(above[0] / below[0]), float(above[0] / below[0])
    interval = bootstrap(
        (above, below),
        lambda above, below, axis: above.sum(axis) / below.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)

"""Confidence intervals of a ratio of sums, by resampling the sources that the parts come from.

The parts of one source, such as the chapters of a book, are alike: they are drawn together or not at all. Knows
nothing of models or text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0
DRAWS_AT_ONCE = 1 << 22


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    sources: Sequence[str],
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> tuple[float, float]:
    """(low, high) of sum(numerators) / sum(denominators): the percentile bootstrap over sources (Efron 1979).

    All three have one entry a part; a source's parts are those with its name. The same seed gives the same interval.
    With few sources it is too narrow, and with one it has no width: it can't tell what another source would give.
    Raises ValueError when there are no parts, their numbers differ, or a denominator is not above 0.
    """
    if not len(numerators) == len(denominators) == len(sources) > 0:
        raise ValueError(
            f"there are {len(numerators)} numerators, {len(denominators)} denominators and {len(sources)} sources: "
            "there must be as many of each, and at least one"
        )
    if not min(denominators) > 0:
        raise ValueError(f"denominators has {min(denominators)}: each must be above 0")
    _, source = np.unique(np.asarray(sources, str), return_inverse=True)
    above, below = np.bincount(source, numerators), np.bincount(source, denominators)  # (S,) sums by source
    rng = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    step = max(1, DRAWS_AT_ONCE // len(above))
    for first in range(0, resamples, step):
        part = ratios[first : first + step]
        counts = rng.multinomial(len(above), np.full(len(above), 1 / len(above)), size=len(part))  # (step, S)
        part[:] = (counts @ above) / (counts @ below)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

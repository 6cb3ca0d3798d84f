"""Bootstrap intervals: against plain resampling and against theory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.release.intervals import ratio_interval

PARTS = st.lists(st.tuples(st.floats(0, 1e4), st.floats(1, 1e4), st.sampled_from("abcdefgh")), min_size=1, max_size=30)


def interval(parts):
    numerators, denominators, sources = zip(*parts, strict=True)
    return ratio_interval(numerators, denominators, sources, resamples=200)


@given(PARTS)
def test_cutting_a_source_does_not_change_the_interval(parts):
    """The chapters of a book are no more evidence than the book. The bounds lie between the extreme sources."""
    sums: dict[str, tuple[float, float]] = {}
    for numerator, denominator, source in parts:
        above, below = sums.get(source, (0.0, 0.0))
        sums[source] = above + numerator, below + denominator
    low, high = interval(parts)
    assert (low, high) == pytest.approx(interval([(*both, source) for source, both in sums.items()]))
    ratios = [above / below for above, below in sums.values()]
    assert min(ratios) <= low * (1 + 1e-9) + 1e-12
    assert low <= high <= max(ratios) * (1 + 1e-9) + 1e-12


def test_intervals_equal_plain_resampling():
    rng = np.random.default_rng(1)
    bits, sizes = rng.gamma(2, 100, 40), rng.integers(50, 400, 40)
    draws = rng.integers(40, size=(20_000, 40))
    slow = np.quantile([bits[drawn].sum() / sizes[drawn].sum() for drawn in draws], [0.025, 0.975])
    fast = ratio_interval(bits, sizes, [str(i) for i in range(40)], resamples=20_000)
    assert fast == pytest.approx(slow, rel=0.02)  # other random numbers


def test_the_interval_contains_the_truth_as_often_as_promised():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(300):
        sizes = rng.integers(100, 1000, 60)
        low, high = ratio_interval(sizes * rng.normal(1.3, 0.2, 60), sizes, [str(i) for i in range(60)], resamples=400)
        inside += low <= 1.3 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_a_denominator_of_0_is_named():
    with pytest.raises(ValueError, match=r"denominators has 0\.0: each must be above 0"):
        ratio_interval([1.0], [0.0], ["a"])

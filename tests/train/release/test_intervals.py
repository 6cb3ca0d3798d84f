"""Bootstrap intervals: against plain resampling, against theory, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.release.intervals import ratio_interval

PARTS = st.lists(st.tuples(st.floats(0, 1e4), st.floats(1, 1e4), st.sampled_from("abcdefgh")), min_size=1, max_size=30)


def interval(parts, **settings):
    numerators, denominators, sources = zip(*parts, strict=True)
    return ratio_interval(numerators, denominators, sources, resamples=200, **settings)


def by_source(parts):
    sums: dict[str, tuple[float, float]] = {}
    for numerator, denominator, source in parts:
        above, below = sums.get(source, (0.0, 0.0))
        sums[source] = above + numerator, below + denominator
    return [(above, below, source) for source, (above, below) in sums.items()]


@given(PARTS)
def test_an_interval_lies_between_the_least_and_the_greatest_source(parts):
    low, high = interval(parts)
    ratios = [above / below for above, below, _ in by_source(parts)]
    assert min(ratios) <= low * (1 + 1e-9) + 1e-12
    assert low <= high <= max(ratios) * (1 + 1e-9) + 1e-12


@given(PARTS)
def test_splitting_a_source_does_not_change_the_interval(parts):
    """Cutting a book into more chapters is no more evidence."""
    assert interval(parts) == pytest.approx(interval(by_source(parts)))


@given(PARTS, st.floats(0.1, 10))
def test_another_unit_scales_the_interval(parts, factor):
    scaled = interval([(numerator * factor, denominator, source) for numerator, denominator, source in parts])
    assert scaled == pytest.approx([factor * bound for bound in interval(parts)])


@given(PARTS)
def test_less_confidence_is_a_narrower_interval_inside(parts):
    low, high = interval(parts)
    inner_low, inner_high = interval(parts, confidence=0.5)
    assert low <= inner_low <= inner_high <= high


def test_intervals_equal_plain_resampling():
    """One source after the other drawn at random, summed, divided; other random numbers, so nearly the same bounds."""
    rng = np.random.default_rng(1)
    bits, sizes = rng.gamma(2, 100, 40), rng.integers(50, 400, 40)
    draws = rng.integers(40, size=(20_000, 40))
    slow = np.quantile([bits[drawn].sum() / sizes[drawn].sum() for drawn in draws], [0.025, 0.975])
    fast = ratio_interval(bits, sizes, [str(i) for i in range(40)], resamples=20_000)
    assert fast == pytest.approx(slow, rel=0.02)


def test_the_truth_lies_inside_as_often_as_promised():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(300):
        sizes = rng.integers(100, 1000, 60)
        low, high = ratio_interval(sizes * rng.normal(1.3, 0.2, 60), sizes, [str(i) for i in range(60)], resamples=400)
        inside += low <= 1.3 <= high
    assert 0.90 <= inside / 300 <= 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "at least one"),
        (([1.0], [1.0, 2.0], ["a"]), "1 numerators, 2 denominators"),
        (([1.0], [0.0], ["a"]), "denominators has 0.0: each must be above 0"),
    ],
)
def test_invalid_sums_are_named(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        ratio_interval(*arguments)

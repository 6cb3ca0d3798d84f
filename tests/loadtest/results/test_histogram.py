"""The figures of histograms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from loadtest.results import histogram

durations = st.lists(st.floats(1e-5, 100), min_size=1, max_size=200)


@given(durations, durations)
def test_percentiles_of_added_histograms_are_nearest_ranks(first: list[float], second: list[float]) -> None:
    together = HdrHistogram.decode(histogram.of_seconds(np.array(first)).encode())
    together.add(histogram.of_seconds(np.array(second)))
    found, values = histogram.figures(together), np.sort([*first, *second])
    for percent in (50, 90, 99):
        rank = max(math.ceil(percent / 100 * len(values) - 1e-9), 1)
        assert found[f"p{percent}"] == pytest.approx(values[rank - 1] * 1000, rel=2e-3, abs=2e-3)
    assert found["max"] == pytest.approx(values[-1] * 1000, rel=2e-3, abs=2e-3)

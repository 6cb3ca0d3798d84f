"""The checks of the settings of a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.load import Load, Mix
from loadtest.results import goodput

mixes = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 50)), min_size=1, max_size=5, unique_by=lambda i: i[0])


@given(mixes)
def test_a_mix_draws_values_by_their_shares(items: list[tuple[int, int]]) -> None:
    mix = Mix.parse(",".join(f"{value}:{share}" for value, share in items), "n")
    drawn = mix.draw(4000, seed=1)
    assert np.array_equal(drawn, Mix.parse(str(mix), "n").draw(4000, seed=1))
    for value, share in items:
        expected = share / sum(share for _, share in items)
        tolerance = 6 * math.sqrt(expected * (1 - expected) / 4000) + 1e-9
        assert (drawn == value).mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("text", ["", "a", "8:x", "0", "-1", "8:0", "8:-1", "8:inf", "8:nan", "8,,9", "1.5"])
def test_errors_of_a_mix_name_the_option(text: str) -> None:
    with pytest.raises(ValueError, match="--max-tokens"):
        Mix.parse(text, "--max-tokens")


@pytest.mark.parametrize("text", ["", "ttft", "ttft<", "ttft>5", "p99<5", "ttft<5,ttft<6", "ttft<1.2.3", "e2e<-5"])
def test_errors_of_goodput_name_the_option(text: str) -> None:
    with pytest.raises(ValueError, match="--goodput"):
        goodput.parse(text)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 1, "rate_per_s": 5.0}, "either"),
        ({}, "either"),
        ({"rate_per_s": 0.0}, "rate is 0"),
        ({"rate_per_s": math.nan}, "rate is nan"),
        ({"concurrency": 1, "duration_s": math.inf}, "duration_s is inf"),
        ({"concurrency": 1, "warmup_s": -1}, "warmup_s is -1"),
        ({"concurrency": 1, "seed": -1}, "seed is -1"),
        ({"concurrency": 1, "timeout_s": math.inf}, "timeout_s is inf"),
        ({"concurrency": 1, "timeout_s": math.nan}, "timeout_s is nan"),
        ({"concurrency": 1, "api_key": "sec\nret"}, "api_key must"),
    ],
)
def test_errors_of_a_load_name_field_and_value(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Load("localhost:1", Mix((8,), (1.0,)), **fields)


def test_whitespace_around_a_key_is_removed() -> None:
    assert Load("localhost:1", Mix((8,), (1.0,)), concurrency=1, api_key=" secret\n").api_key == "secret"

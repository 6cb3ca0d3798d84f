"""The verdicts of comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loadtest.results.compare import compare


def result_of(latencies_ms: list[float]) -> dict[str, Any]:
    """Return a result with one run for each latency."""
    load = {
        "concurrency": 4, "rate_per_s": None, "arrivals": "poisson", "stream": False, "max_tokens": "8",
        "prompt_words": None,
    }  # fmt: skip
    runs = [
        {"load": load, "requests_per_s": 4000 / ms, "tokens_per_s": 0, "latency_ms": {"p50": ms, "p99": ms * 2}}
        | {"server": {"cores": None}}
        for ms in latencies_ms
    ]
    return {"runs": runs}


def verdicts(before: list[float], after: list[float]) -> dict[str, str]:
    return {change.figure: change.verdict for change in compare(result_of(before), result_of(after))}


def test_a_single_run_gives_no_verdict() -> None:
    assert set(verdicts([10.0], [20.0]).values()) == {"can't tell"}
    assert set(verdicts([10.0, 10.1, 10.2], [20.0]).values()) == {"can't tell"}


def test_a_difference_has_direction_and_interval() -> None:
    slower = verdicts([10.0, 10.3, 9.8, 10.1], [12.0, 12.3, 11.8, 12.1])
    assert slower == {"requests/s": "worse", "latency p50": "worse", "latency p99": "worse"}
    assert set(verdicts([12.0, 12.3, 11.8, 12.1], [10.0, 10.3, 9.8, 10.1]).values()) == {"better"}
    (change, *_) = compare(result_of([10.0, 10.3, 9.8, 10.1]), result_of([12.0, 12.3, 11.8, 12.1]))
    assert change.ratio_low < change.ratio < change.ratio_high < 1


def test_results_without_a_common_load_are_refused() -> None:
    other = result_of([10.0])
    other["runs"][0]["load"] |= {"concurrency": 8}
    with pytest.raises(ValueError, match="no load in common"):
        compare(result_of([10.0]), other)


def test_noise_is_rarely_called_a_difference() -> None:
    """300 comparisons of one distribution with itself: about 15 would be wrong at 5 %, and 40 is not chance."""
    rng = np.random.default_rng(5)
    noise = np.exp(rng.normal(0, 0.1, (300, 2, 4))) * 10
    wrong = [set(verdicts(*pair.tolist()).values()) != {"no difference seen"} for pair in noise]
    assert sum(wrong) < 40

"""What a service adds to its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.load import Load, Mix
from loadtest.scenarios import overhead
from loadtest.stub_server import running


def test_rounds_alternate_and_the_median_difference_counts() -> None:
    """The stub takes 200 ms for every answer, so the difference is most of that."""
    with running("--delay-ms", "200") as address:
        single = Load(address, Mix((8,), (1.0,)), 1, duration_s=0.5, warmup_s=0.1)
        result = overhead.measure(single, Path("models/stories-8m"), rounds=3, quiet=True)
    runs = result["runs"]
    assert [(run["load"]["protocol"], run["load"]["stream"], run["repeat"]) for run in runs] == [
        (protocol, stream, repeat)
        for repeat in range(3)
        for protocol, stream in (("engine", False), ("grpc", False), ("grpc", True))
    ]
    p50 = [run["latency_ms"]["p50"] for run in runs]
    assert result["overhead_p50_ms"] == pytest.approx(
        sorted(p50[3 * i + 1] - p50[3 * i] for i in range(3))[1], abs=1e-3
    )
    assert result["service_p50_ms"] >= 200
    assert result["first_token_p50_ms"] >= 200

"""The mixed load of `loadtest.bench.mixed_hour` for two minutes: every call ends as expected.

`make soak` runs it for an hour, and shows the memory.
"""

from pathlib import Path

import pytest

from loadtest.bench.mixed_hour.__main__ import run
from loadtest.bench.mixed_hour.calls import KINDS

pytestmark = pytest.mark.chaos

MINUTES = 2


def test_every_call_of_the_mixed_load_ends_as_expected(tmp_path: Path) -> None:
    result = run(MINUTES, rate_per_s=6.0, period_min=MINUTES, out=tmp_path / "mixed.json")
    assert result["unexpected"] == 0, result["examples"]
    assert {event["what"] for event in result["events"] if "error" not in event} == {
        "a burst", "5 replicas", "another key", "4 replicas", "a replica is killed",
    }  # fmt: skip
    assert set(KINDS) <= set(result["kinds"])
    assert {"replica", "HAProxy", "proxy actor", "controller", "dashboard agent"} <= set(result["memory"])

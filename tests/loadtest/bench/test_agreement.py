"""What `python -m loadtest.bench.agreement` computes of its rounds. `test_clients` runs it with the real programs."""

import hypothesis.strategies as st
import pytest
from helpers.http import json_server
from hypothesis import given

from loadtest.bench import agreement
from loadtest.bench.agreement import GENERATORS, REFERENCE, compare
from loadtest.load import Load, Mix

TIMES = st.fixed_dictionaries({name: st.floats(0.1, 100) for name in GENERATORS})


@given(st.lists(TIMES, min_size=1, max_size=5))
def test_a_ratio_compares_medians_of_all_rounds(rounds: list[dict[str, float]]) -> None:
    found = compare(rounds)
    middle = {name: sorted(times[name] for times in rounds) for name in GENERATORS}
    for name, times in middle.items():
        lower, upper = times[(len(times) - 1) // 2], times[len(times) // 2]
        assert abs(found["median_ms"][name] - (lower + upper) / 2) < 1e-3
    assert found["ratios"][REFERENCE] == 1
    assert (found["ratios"]["aiperf"] > 1.01) <= (found["median_ms"]["aiperf"] > found["median_ms"][REFERENCE])


def test_the_model_is_read_without_a_proxy(dead_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "GENERATORS", {REFERENCE: lambda run: float(len(run.model))})
    with json_server({"data": [{"id": "four"}]}) as (url, _):
        load = Load(url, Mix.parse("4", "n"), 1)
        assert agreement.measure(load, ("Once",), rounds=1) == [{REFERENCE: 4.0}]

"""What `python -m loadtest.bench.agreement` computes of its rounds. `test_clients` runs it with the real programs."""

import json
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from helpers.http import json_server
from hypothesis import given

from loadtest.bench import agreement
from loadtest.bench.agreement import REFERENCE, Run, agreement_table, compare, from_records
from loadtest.load import Load, Mix

NAMES = ("aiperf", "guidellm", REFERENCE)
TIMES = st.fixed_dictionaries({name: st.floats(0.1, 100) for name in NAMES})


@given(st.lists(TIMES, min_size=1, max_size=5))
def test_a_ratio_is_the_median_of_the_ratios_within_rounds(rounds: list[dict[str, float]]) -> None:
    found = compare(rounds)
    for name in NAMES:
        for figure, of_rounds in (
            ("median_ms", sorted(times[name] for times in rounds)),
            ("ratios", sorted(times[name] / times[REFERENCE] for times in rounds)),
        ):
            lower, upper = of_rounds[(len(rounds) - 1) // 2], of_rounds[len(rounds) // 2]
            assert found[figure][name] == pytest.approx((lower + upper) / 2, abs=1e-3)
    assert found["ratios"][REFERENCE] == 1
    assert [line.split(" | ")[0] for line in agreement_table(found).splitlines()[2:]] == [f"| {n}" for n in NAMES]


def test_each_round_begins_with_another_program(dead_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is read without a proxy."""
    asked: list[str] = []

    def program(name: str) -> Callable[[Run], dict[str, float]]:
        def execute(run: Run) -> dict[str, float]:
            asked.append(name)
            return {name: float(len(run.model))}

        return execute

    monkeypatch.setattr(agreement, "GENERATORS", tuple(map(program, NAMES)))
    with json_server({"data": [{"id": "four"}]}) as (url, _):
        load = Load(url, Mix.parse("4", "n"), 1)
        assert agreement.measure(load, ("Once",), rounds=3) == [dict.fromkeys(NAMES, 4.0)] * 3
    for name in NAMES:
        assert sorted(asked.index(name, 3 * number) - 3 * number for number in range(3)) == [0, 1, 2]


def message(time_ms: float, n_tokens: int, text: str) -> dict[str, Any]:
    """Return a message as aiperf's raw records have it. n_tokens: of the answer until then."""
    event = {"choices": [{"text": text}], "usage": {"completion_tokens": n_tokens}}
    return _response(time_ms, json.dumps(event))


def _response(time_ms: float, value: str) -> dict[str, Any]:
    return {"perf_ns": round(time_ms * 1e6), "packets": [{"name": "data", "value": value}]}


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=20), st.integers(1, 18), st.floats(0.5, 50), st.integers(0, 10**6)
)
def test_a_late_first_read_does_not_change_the_time_between_tokens(
    tokens: list[int], n_late: int, token_ms: float, began_ms: int
) -> None:
    """Tokens come at equal times. The first `n_late` messages are read together with the one after them."""
    n_late = min(n_late, len(tokens) - 2)
    responses, n_tokens = [], 0
    for of_message in tokens:
        n_tokens += of_message
        at_least = sum(tokens[: n_late + 1])
        responses.append(message(began_ms + token_ms * max(n_tokens, at_least), n_tokens, "a"))
    usage = {"choices": [], "usage": {"completion_tokens": n_tokens}}
    end = [_response(began_ms + 10**6, json.dumps(usage)), _response(began_ms + 10**6, "[DONE]")]
    assert from_records([{"responses": responses + end}]) == pytest.approx(token_ms, rel=1e-3)


def test_an_answer_in_one_read_has_no_time_between_tokens() -> None:
    whole = {"responses": [message(5, 3, "a b"), message(5, 4, "c")]}
    failed: dict[str, Any] = {"responses": []}
    assert from_records([whole, failed, {"responses": [message(1, 1, "a"), message(7, 4, "b c d")]}]) == 2
    with pytest.raises(ValueError, match="--max-tokens"):
        from_records([whole, failed])

"""The figures of a run, computed from a few known calls."""

from __future__ import annotations

import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from loadtest.generator.call_record import CallRecord
from loadtest.load import Load, Mix
from loadtest.results.summary import summarize

ONE = Mix((8,), (1.0,))
OPEN = Load("localhost:1", ONE, rate_per_s=1, duration_s=5, stream=True)
CLOSED = Load("localhost:1", ONE, concurrency=1, duration_s=5)


def call(intended: float, sent: float, ended: float, **more: object) -> CallRecord:
    return CallRecord(0, 8, intended, sent, ended, **{"tokens": 8, "replica": "a", **more})  # type: ignore[arg-type]


def near(value: float) -> object:
    return pytest.approx(value, rel=2e-3)


def test_open_loop_counts_calls_from_their_intended_time() -> None:
    calls = [call(-0.1, 0.1, 0.2), call(1.0, 1.3, 1.5), call(4.9, 4.9, 9.9)]  # the first belongs to the warm-up
    run = summarize(OPEN, calls)
    assert run["requests"] == run["statuses"]["OK"] == 2
    assert run["latency_ms"]["max"] == near(5000)
    assert run["latency_ms"]["p50"] == near(500)
    assert run["latency_from_send_ms"]["p50"] == near(200)
    assert run["requests_per_s"] == pytest.approx(2 / 5)  # those that ended within the measured time
    assert (run["sends"]["late"], run["sends"]["latest_ms"]) == (1, near(300))


def test_closed_loop_counts_calls_that_ended_in_time() -> None:
    calls = [call(-1, -1, -0.5), call(-0.5, -0.5, 0.5), call(1, 1, 2), call(4, 4, 7), call(4.5, 4.5, 5.5)]
    run = summarize(CLOSED, calls)
    assert run["requests"] == 2
    assert run["tokens_per_s"] == pytest.approx(2 * 8 / 5, abs=0.05)
    assert run["unfinished"] == {"requests": 2, "longest_ms": near(3000)}


def test_closed_loop_with_a_number_counts_calls_after_warm_up() -> None:
    load = Load("localhost:1", ONE, concurrency=1, requests=2)
    run = summarize(load, [call(-0.5, -0.5, 0.5), call(1, 1, 2), call(2, 2, 4)])
    assert (run["requests"], run["window_s"]) == (2, 4)


def test_stream_figures_follow_from_message_times() -> None:
    """Messages of 1, 4 and 3 tokens at 0.1, 0.3 and 0.9 s."""
    run = summarize(OPEN, [call(0, 0, 1, text_at=[0.1, 0.3, 0.9], text_tokens=[1, 4, 3])])
    assert run["ttft_ms"]["p50"] == near(100)
    assert run["tpot_ms"]["p50"] == near(800 / 7)
    assert (run["gap_ms"]["p50"], run["gap_ms"]["max"]) == (near(200), near(600))
    assert (run["itl_ms"]["p50"], run["itl_ms"]["max"]) == (near(50), near(200))
    assert HdrHistogram.decode(run["histograms"]["itl"]).get_total_count() == 7
    assert run["messages"] == {"tokens_a_message": 2.67, "tokens_of_each_known": True}


@given(st.integers(1, 40), st.integers(0, 80))
def test_unknown_tokens_are_spread_evenly_after_the_first(n_messages: int, tokens: int) -> None:
    counts = CallRecord(0, 1, 0, 0, text_at=[0.0] * n_messages, tokens=tokens).tokens_of_messages()
    assert counts.sum() == max(tokens, 1)
    if n_messages > 1:
        assert counts[0] == 1
        assert counts[1:].max() - counts[1:].min() <= 1


def test_unknown_tokens_give_the_mean_time_between_tokens() -> None:
    """One token, then 63 in two messages: other tools divide the time after the first token by 63 too."""
    told, untold = (
        summarize(OPEN, [call(0, 0, 1, text_at=[0.1, 0.5, 0.9], text_tokens=counts, tokens=64)])
        for counts in ([1, 32, 31], None)
    )
    assert untold["tpot_ms"]["p50"] == told["tpot_ms"]["p50"] == near(800 / 63)
    assert untold["itl_ms"]["mean"] == pytest.approx(told["itl_ms"]["mean"], rel=0.02)


def test_goodput_needs_every_limit_and_an_answer() -> None:
    good = call(0, 0, 0.4, text_at=[0.1])
    slow, late, silent = call(0, 0, 0.6, text_at=[0.1]), call(0, 0, 0.4, text_at=[0.3]), call(0, 0, 0.4)
    failed = call(0, 0, 0.1, text_at=[0.1], status="UNAVAILABLE")
    run = summarize(OPEN, [good, slow, late, silent, failed], {"e2e": 500, "ttft": 200})
    assert run["goodput"]["share"] == pytest.approx(1 / 5)


def test_failures_have_durations_by_status() -> None:
    refused = [call(0, 0, 0.002, status="RESOURCE_EXHAUSTED") for _ in range(2)]
    run = summarize(CLOSED, [*(call(0, 0, 0.1) for _ in range(3)), *refused])
    assert run["failures_ms"]["RESOURCE_EXHAUSTED"]["p99"] == pytest.approx(2, rel=0.01)
    assert list(run["failures_ms"]) == ["RESOURCE_EXHAUSTED"]
    assert run["latency_ms"]["p50"] == near(100)


def test_answers_are_counted_by_replica() -> None:
    calls = [call(0, 0, 0.1, replica=name) for name in ("a", "a", "b", "")]
    assert summarize(CLOSED, calls)["replicas"] == {"a": 2, "b": 1}


def test_run_without_calls_has_empty_figures() -> None:
    run = summarize(OPEN, [])
    assert (run["requests"], run["latency_ms"], run["requests_per_s"]) == (0, {}, 0)

"""What the load test computes: plans of requests, figures of calls, verdicts of comparisons. No server runs here."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loadtest import goodput, histogram, plots
from loadtest.client.loops import Asking, Ledger
from loadtest.client.pool import share_out
from loadtest.compare import compare
from loadtest.load import Load, Mix
from loadtest.records import Call, Records, tokens_by_message
from loadtest.summary import summarize
from loadtest.workload import Ask, Workload, arrivals, read_prompts

ONE = Mix((8,), (1.0,))
open_loads = st.builds(
    Load,
    server=st.just("localhost:1"),
    max_tokens=st.just(ONE),
    rate_per_s=st.floats(0.5, 500),
    arrivals=st.sampled_from(["poisson", "constant"]),
    duration_s=st.floats(0.1, 5),
    requests=st.none() | st.integers(1, 300),
    warmup_s=st.floats(0, 2),
    seed=st.integers(0, 2**20),
)
closed_loads = st.builds(
    Load,
    server=st.just("localhost:1"),
    max_tokens=st.just(ONE),
    concurrency=st.integers(1, 100),
    requests=st.none() | st.integers(1, 300),
    connections=st.none() | st.integers(1, 50),
)


@given(open_loads)
def test_a_schedule_is_fixed_before_the_run_and_lies_within_it(load: Load) -> None:
    times = arrivals(load)
    assert np.array_equal(times, arrivals(load))
    assert (np.diff(times) >= 0).all()
    assert (times >= -load.warmup_s).all()
    measured = times[times >= 0]
    if load.requests is not None:
        assert len(measured) == load.requests
    else:
        assert (measured < load.duration_s).all()
    if load.arrivals == "constant":
        assert np.diff(times) == pytest.approx(1 / load.rate_per_s)
        if load.requests is None:
            assert abs(len(measured) - load.duration_s * load.rate_per_s) <= 1


def test_poisson_arrivals_have_exponential_pauses() -> None:
    times = arrivals(Load("localhost:1", ONE, rate_per_s=200, duration_s=50, warmup_s=0, seed=3))
    assert stats.kstest(np.diff(times), stats.expon(scale=1 / 200).cdf).pvalue > 0.001
    assert len(times) == pytest.approx(10_000, abs=6 * math.sqrt(10_000))


@given(open_loads | closed_loads, st.integers(1, 9))
def test_processes_together_do_what_one_would(load: Load, n_processes: int) -> None:
    jobs = share_out(load, n_processes)
    assert len(jobs) <= n_processes
    if load.rate_per_s is not None:
        assert np.array_equal(np.sort(np.concatenate([job.times_s for job in jobs])), arrivals(load))
    else:
        assert sum(job.n_clients for job in jobs) == load.concurrency
        assert all(job.n_clients for job in jobs)
    if load.requests is not None:
        assert sum(job.requests for job in jobs) == load.requests
    turns = [job.first_turn + job.turn_step * k for job in jobs for k in range(20)]
    assert sorted(turns) == list(range(20 * len(jobs)))


def test_requests_are_the_same_in_every_run_with_a_seed_and_others_with_another() -> None:
    load = Load("localhost:1", Mix.parse("4:1,9:1", "n"), 1, prompt_words=Mix.parse("5,30", "words"))
    workload, again, other = Workload(load), Workload(load), Workload(dataclasses.replace(load, seed=1))
    asks = [workload[n] for n in range(200)]
    assert asks == [again[n] for n in range(200)]
    assert asks != [other[n] for n in range(200)]
    assert {ask.max_tokens for ask in asks} == {4, 9}
    assert {len(ask.prompt.split()) for ask in asks} == {5, 30}
    assert len({ask.seed for ask in asks}) == 200


def test_long_prompts_hardly_begin_alike() -> None:
    """Else a service would take over from its cache what is meant to be read."""
    workload = Workload(Load("localhost:1", Mix.parse("4", "n"), 1, prompt_words=Mix.parse("10", "words")))
    prompts = [workload[n].prompt.split() for n in range(500)]

    def begin_alike(one: list[str], other: list[str]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))

    shared = [
        max(begin_alike(prompt, other) for other in prompts[max(0, n - 64) : n])
        for n, prompt in enumerate(prompts)
        if n
    ]
    assert sum(shared) / len(shared) < 1.0


def test_what_goes_wrong_in_the_load_test_itself_ends_a_run_of_either_kind() -> None:
    """It is no call that failed, and must not be missing from the figures without a word."""

    class Broken:
        async def ask(self, ask: Ask, call: Call, connection: int) -> None:
            if call.turn % 2:
                raise RuntimeError("the load test is broken")
            call.status = "OK"

    load = Load("localhost:1", Mix.parse("4", "n"), 1, duration_s=1)
    asking = Asking(load, Broken(), Workload(load), Ledger())
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(asking.open_loop(0, 1, time.monotonic() + np.arange(10) / 100))
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(asking.closed_loop(0, 1, 2, time.monotonic(), None))


mixes = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 50)), min_size=1, max_size=5, unique_by=lambda i: i[0])


@given(mixes)
def test_a_mix_survives_its_text_form_and_draws_what_it_says(items: list[tuple[int, int]]) -> None:
    mix = Mix.parse(",".join(f"{value}:{share}" for value, share in items), "n")
    again = Mix.parse(str(mix), "n")
    assert again.values == mix.values
    drawn = mix.draw(4000, seed=1)
    assert np.array_equal(drawn, again.draw(4000, seed=1))
    for value, share in items:
        expected = share / sum(share for _, share in items)
        tolerance = 6 * math.sqrt(expected * (1 - expected) / 4000) + 1e-9
        assert (drawn == value).mean() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("text", ["", "a", "8:x", "0", "-1", "8:0", "8:-1", "8:inf", "8:nan", "8,,9", "1.5"])
def test_a_bad_mix_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="--max-tokens"):
        Mix.parse(text, "--max-tokens")


@pytest.mark.parametrize("text", ["", "ttft", "ttft<", "ttft>5", "p99<5", "ttft<5,ttft<6", "ttft<1.2.3", "e2e<-5"])
def test_a_bad_goodput_is_named(text: str) -> None:
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
    ],
)
def test_a_bad_load_is_told_field_value_and_limit(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Load("localhost:1", ONE, **fields)


def test_prompt_files_are_text_or_json_lines_and_errors_name_the_line(tmp_path) -> None:
    text, lines, bad = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "bad.jsonl"
    text.write_text("One day\n\nTwo days\n")
    lines.write_text('{"prompt": "One day", "id": 1}\n"Two days"\n')
    bad.write_text('"fine"\n{"text": 1}\n')
    assert read_prompts(text) == read_prompts(lines) == ("One day", "Two days")
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(bad)
    text.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(text)


durations = st.lists(st.floats(1e-5, 100), min_size=1, max_size=200)


@given(durations, durations)
def test_histograms_find_percentiles_to_a_thousandth_and_add_up(first: list[float], second: list[float]) -> None:
    together = histogram.decode(histogram.encode(histogram.of_seconds(np.array(first))))
    together.add(histogram.of_seconds(np.array(second)))
    found, values = histogram.figures(together), np.sort([*first, *second])
    for percent in (50, 90, 99):
        rank = max(math.ceil(percent / 100 * len(values) - 1e-9), 1)
        assert found[f"p{percent}"] == pytest.approx(values[rank - 1] * 1000, rel=2e-3, abs=2e-3)
    assert found["max"] == pytest.approx(values[-1] * 1000, rel=2e-3, abs=2e-3)


@st.composite
def some_calls(draw: st.DrawFn) -> list[Call]:
    calls = []
    for turn in range(draw(st.integers(0, 30))):
        intended = draw(st.floats(99, 105))
        sent = intended + draw(st.floats(0, 1))
        gaps = draw(st.lists(st.floats(0.001, 0.5), max_size=5))
        text_at = (sent + np.cumsum(gaps)).tolist()
        call = Call(
            turn, 8, intended, sent, sent + sum(gaps) + 0.01, tokens=len(gaps) * 2, replica="a", text_at=text_at
        )
        call.status = draw(st.sampled_from(["OK", "OK", "UNAVAILABLE"]))
        calls.append(call)
    return calls


@given(some_calls(), st.integers(0, 30))
def test_records_of_two_processes_are_those_of_one(calls: list[Call], cut: int) -> None:
    merged = Records.merged([Records.of(calls[:cut], 100.0), Records.of(calls[cut:], 100.0)])
    whole = Records.of(calls, 100.0)
    for column in dataclasses.fields(Records):
        np.testing.assert_array_equal(getattr(merged, column.name), getattr(whole, column.name))
    mask = whole.status == "OK"
    only_ok = Records.of([call for call in calls if call.status == "OK"], 100.0)
    for column in dataclasses.fields(Records):
        np.testing.assert_array_equal(getattr(whole.where(mask), column.name), getattr(only_ok, column.name))


@given(some_calls(), st.floats(1, 2000), st.floats(1, 500))
def test_figures_are_what_counting_call_by_call_gives(calls: list[Call], e2e_ms: float, ttft_ms: float) -> None:
    load = Load("localhost:1", ONE, rate_per_s=10, stream=True, duration_s=5)
    run = summarize(load, Records.of(calls, 100.0), {"e2e": e2e_ms, "ttft": ttft_ms})
    counted = [call for call in calls if call.intended_at >= 100.0]
    ok = [call for call in counted if call.status == "OK"]
    assert run["requests"] == len(counted)
    assert run["statuses"].get("OK", 0) == sum(run["replicas"].values()) == len(ok)
    for name, start in (("latency_ms", "intended_at"), ("latency_from_send_ms", "sent_at")):
        longest = max([(call.ended_at - getattr(call, start)) * 1000 for call in ok], default=None)
        assert run[name].get("max") == (None if longest is None else pytest.approx(longest, rel=2e-3, abs=2e-3))
    good = 0
    for call in ok:
        in_time = (call.ended_at - 100.0 - (call.intended_at - 100.0)) * 1000 < e2e_ms
        good += in_time and bool(call.text_at) and (call.text_at[0] - 100 - (call.intended_at - 100)) * 1000 < ttft_ms
    assert run["goodput"]["share"] == pytest.approx(good / len(counted) if counted else 0, abs=1e-6)
    ended = [call for call in calls if call.status == "OK" and 100.0 <= call.ended_at <= 105.0]
    assert run["requests_per_s"] == pytest.approx(len(ended) / 5, abs=1e-3)


@given(st.integers(1, 40), st.integers(0, 80))
def test_tokens_spread_over_messages_are_all_there(n_messages: int, tokens: int) -> None:
    counts = tokens_by_message(Call(0, 1, 0, text_at=[0.0] * n_messages, tokens=tokens))
    assert counts.sum() == max(tokens, 1)
    assert counts.max() - counts.min() <= 1


def result_of(latencies_ms: list[float]) -> dict:
    """A result with one run a latency, otherwise alike."""
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


def test_a_single_run_can_t_tell_whatever_it_shows() -> None:
    assert set(verdicts([10.0], [20.0]).values()) == {"can't tell"}
    assert set(verdicts([10.0, 10.1, 10.2], [20.0]).values()) == {"can't tell"}


def test_a_real_difference_is_found_with_its_direction_and_size() -> None:
    slower = verdicts([10.0, 10.3, 9.8, 10.1], [12.0, 12.3, 11.8, 12.1])
    assert slower == {"requests/s": "worse", "latency p50": "worse", "latency p99": "worse"}
    assert set(verdicts([12.0, 12.3, 11.8, 12.1], [10.0, 10.3, 9.8, 10.1]).values()) == {"better"}
    (change, *_) = compare(result_of([10.0, 10.3, 9.8, 10.1]), result_of([12.0, 12.3, 11.8, 12.1]))
    assert change.ratio_low < change.ratio < change.ratio_high < 1
    other = result_of([10.0])
    other["runs"][0]["load"] |= {"concurrency": 8}
    with pytest.raises(ValueError, match="no load in common"):
        compare(result_of([10.0]), other)


def test_noise_alone_is_seldom_called_a_difference() -> None:
    """300 comparisons of one distribution with itself: at 5 % some 15 would be wrong, 40 can't be luck."""
    rng = np.random.default_rng(5)
    noise = np.exp(rng.normal(0, 0.1, (300, 2, 4))) * 10
    wrong = [set(verdicts(*pair.tolist()).values()) != {"no difference seen"} for pair in noise]
    assert sum(wrong) < 40


def test_services_of_different_kinds_share_no_line_over_their_replicas() -> None:
    """A point of the other proxy, or of a bare server, would make a bend that no service has."""

    def measured(series: str, replicas: int) -> dict:
        return result_of([10.0]) | {"series": series, "replicas": replicas}

    results = [measured("one", 1), measured("one", 4), measured("other", 4), measured("", 0)]
    figure = plots.against_replicas(results, stream=False)
    assert figure is not None
    assert figure.axes[0].get_legend_handles_labels()[1] == ["one, 4 clients"]
    assert plots.against_replicas(results[1:], stream=False) is None


def test_a_server_that_names_no_replica_has_none() -> None:
    calls = [Call(turn, 8, 0.0, 0.0, 0.1, tokens=8) for turn in range(3)]
    run = summarize(Load("http://localhost:1", ONE, concurrency=1, duration_s=1), Records.of(calls, 0.0))
    assert (run["replicas"], run["replica_spread"], run["requests"]) == ({}, None, 3)


def test_how_long_a_failure_took_is_told_by_status() -> None:
    calls = [Call(turn, 8, 0.0, 0.0, 0.1, tokens=8) for turn in range(3)]
    calls += [Call(turn, 8, 0.0, 0.0, 0.002, status="RESOURCE_EXHAUSTED") for turn in range(2)]
    run = summarize(Load("localhost:1", ONE, concurrency=1, duration_s=1), Records.of(calls, 0.0))
    (status,) = run["failures_ms"]
    assert (status, run["failures_ms"][status]["p99"]) == ("RESOURCE_EXHAUSTED", pytest.approx(2, rel=0.01))
    assert run["latency_ms"]["p50"] == pytest.approx(100, rel=0.01)

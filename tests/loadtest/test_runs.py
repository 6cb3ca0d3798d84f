"""Runs against real servers: a stub with known delays, and the engine alone."""

from __future__ import annotations

from typing import Any

import pytest
from hdrh.histogram import HdrHistogram

from loadtest.generator.workload import arrivals
from loadtest.load import Load, Mix
from loadtest.results import histogram
from loadtest.stub_server import DRAWS, running
from loadtest.sweep import Sweep, run_sweep

EIGHT = Mix((8,), (1.0,))


def one_run(load: Load, n_processes: int | None = None) -> dict[str, Any]:
    (run,) = run_sweep(Sweep((load,), n_processes=n_processes), quiet=True)
    return run


def test_percentiles_show_known_delays() -> None:
    """Each percentile is at least the delay of the same rank. Noise cannot bridge the two delays."""
    mix = "10:0.8,500:0.2"
    with running("--delay-ms", mix) as server:
        run = one_run(Load(server, EIGHT, concurrency=20, requests=100, warmup_s=0))
    delays = sorted(Mix.parse(mix, "n").draw(DRAWS, seed=1)[1:101].tolist())
    assert run["requests"] == run["statuses"]["OK"] == 100
    for percent in (50, 90, 95, 99):
        assert run["latency_ms"][f"p{percent}"] >= delays[percent - 1]
    assert run["latency_ms"]["p50"] < 500


def test_only_latency_from_the_intended_time_shows_a_stall() -> None:
    """Coordinated omission: only one request may be open, and the server stops for a third of the run.

    About half of the requests intended during the stall wait for more than half of it. Only one is sent before it.
    """
    with running("--freeze-after-s", "0.5", "--freeze-s", "1") as server:
        load = Load(server, EIGHT, rate_per_s=100, arrivals="constant", duration_s=3, warmup_s=0, max_in_flight=1)
        run = one_run(load)
    assert run["requests"] == run["statuses"]["OK"] == 300
    waits = {}
    for name in ("latency", "latency_from_send"):
        durations_ms, counts = histogram.recorded(HdrHistogram.decode(run["histograms"][name]))
        waits[name] = counts[durations_ms >= 500].sum()
    assert waits["latency"] >= 40
    assert waits["latency_from_send"] <= 5
    assert run["sends"]["late"] >= 40


def test_tokens_of_messages_are_counted_or_unknown() -> None:
    def run_against(*arguments: str) -> dict[str, Any]:
        with running("--tokens-a-message", "4", "--token-ms", "2", *arguments) as server:
            return one_run(Load(server, EIGHT, concurrency=2, stream=True, requests=10, warmup_s=0))

    counted, unknown = run_against(), run_against("--untold")
    assert counted["messages"] == {"tokens_a_message": 4.0, "tokens_of_each_known": True}
    assert not unknown["messages"]["tokens_of_each_known"]
    for run in (unknown, counted):
        assert run["tokens_an_answer"] == 8
        assert run["gap_ms"]["p50"] >= 8  # four tokens of 2 ms
        assert HdrHistogram.decode(run["histograms"]["gap"]).get_total_count() == 10
    assert HdrHistogram.decode(counted["histograms"]["itl"]).get_total_count() == 10 * 4  # after the first messages


@pytest.mark.parametrize("settings", [{"concurrency": 5, "requests": 50}, {"rate_per_s": 60.0, "duration_s": 1.0}])
def test_several_processes_share_a_run(settings: dict[str, Any]) -> None:
    with running() as server:
        load = Load(server, EIGHT, warmup_s=0.2, **settings)
        run = one_run(load, n_processes=3)
    expected = 50 if load.requests else int((arrivals(load) >= 0).sum())
    assert run["requests"] == run["statuses"]["OK"] == expected
    assert run["client"]["processes"] == 3
    assert run["server"]["by_role"].keys() == {"server"}


def test_the_engine_is_measured_without_a_server() -> None:
    run = one_run(Load("engine:models/stories-8m", EIGHT, concurrency=3, stream=True, requests=12, warmup_s=0))
    assert run["statuses"] == {"OK": 12}
    assert run["messages"]["tokens_of_each_known"]
    assert run["server"]["cores"] is None


def test_ignore_eos_gives_every_answer_all_its_tokens() -> None:
    """Without it, some of these stories end before 200 tokens."""
    long = Mix((200,), (1.0,))
    engine = "engine:models/stories-8m"
    ended, full = (
        one_run(Load(engine, long, concurrency=8, requests=24, warmup_s=0, ignore_eos=ignore))
        for ignore in (False, True)
    )
    assert ended["full_length_answers"] < full["full_length_answers"] == full["requests"]

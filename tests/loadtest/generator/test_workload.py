"""The requests of a run and their times."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from loadtest.generator.process_pool import share_out
from loadtest.generator.workload import Workload, arrivals, read_prompts
from loadtest.load import Load, Mix

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
def test_a_schedule_is_repeatable_and_within_the_run(load: Load) -> None:
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
def test_several_processes_make_the_same_calls_as_one(load: Load, n_processes: int) -> None:
    jobs = share_out(load, n_processes)
    assert len(jobs) <= n_processes
    if load.rate_per_s is not None:
        assert np.array_equal(np.sort(np.concatenate([job.times_s() for job in jobs])), arrivals(load))
    else:
        clients = [job.share(load.concurrency) for job in jobs]
        assert sum(clients) == load.concurrency
        assert min(clients) >= 1
    if load.requests is not None:
        assert sum(job.share(load.requests) for job in jobs) == load.requests


def test_requests_depend_only_on_the_seed() -> None:
    load = Load("localhost:1", Mix.parse("4:1,9:1", "n"), 1, prompt_words=Mix.parse("5,30", "words"))
    workload, again, other = Workload(load), Workload(load), Workload(dataclasses.replace(load, seed=1))
    requests = [workload[n] for n in range(200)]
    assert requests == [again[n] for n in range(200)]
    assert requests != [other[n] for n in range(200)]
    assert {request.max_tokens for request in requests} == {4, 9}
    assert {len(request.prompt.split()) for request in requests} == {5, 30}
    assert len({request.seed for request in requests}) == 200


def test_long_prompts_share_almost_no_prefix() -> None:
    """Otherwise the service would reuse cached prefixes."""
    workload = Workload(Load("localhost:1", Mix.parse("4", "n"), 1, prompt_words=Mix.parse("10", "words")))
    prompts = [workload[n].prompt.split() for n in range(500)]

    def common_prefix(one: list[str], other: list[str]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))

    longest = [max(common_prefix(prompts[n], other) for other in prompts[max(0, n - 64) : n]) for n in range(1, 500)]
    assert sum(longest) / len(longest) < 1.0


def test_prompt_files_are_text_or_json_lines(tmp_path: Path) -> None:
    text, lines, bad = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "bad.jsonl"
    text.write_text("One day\n\nTwo days\n")
    lines.write_text('{"prompt": "One day", "id": 1}\n"Two days"\n')
    bad.write_text('"fine"\n{"text": 1}\n')
    assert read_prompts(text) == read_prompts(lines) == ("One day", "Two days")
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(bad)
    text.write_text("\n")
    with pytest.raises(ValueError, match="contains no prompt"):
        read_prompts(text)

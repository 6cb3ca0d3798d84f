"""`tinylm bench` runs, and its figures are consistent. The tests don't judge the speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm.bench import measure_bandwidth

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_last_line_is_a_report_as_json():
    lines = run("tinylm.cli", "bench", "--batches", "1,3", "--prompts", "5").splitlines()
    assert len(lines) > 5
    report = json.loads(lines[-1])
    assert [row["batch"] for row in report["decode"]] == [1, 3]
    assert [row["prompt_tokens"] for row in report["prefill"]] == [5]
    for row in report["decode"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
        assert row["bytes_per_step"] > 7_800_000 + row["batch"] * 32 * 6912  # the weights, and at least the prompts
        assert 0 < row["share_of_peak"] < 1


def test_a_small_model_gets_prompts_that_fit(tiny_model_dir):
    lines = run("tinylm.cli", "bench", "--model", str(tiny_model_dir), "--batches", "160").splitlines()
    assert [row["prompt_tokens"] for row in json.loads(lines[-1])["prefill"]] == [16]


def test_a_clock_that_stands_still_does_not_stop_a_benchmark(monkeypatch):
    real = time.thread_time
    monkeypatch.setattr(time, "thread_time", lambda: real() // 5e-5 * 5e-5)  # it moves once in 50 µs
    assert 1e8 < measure_bandwidth(1000) < 1e13


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--batches", "1,x"], ["--prompts", "256"]])
def test_an_impossible_benchmark_is_refused_in_one_line(arguments):
    command = [sys.executable, "-m", "tinylm.cli", "bench", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")

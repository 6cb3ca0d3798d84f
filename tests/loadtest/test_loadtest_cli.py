"""The command line of the load generator: results, reports, comparisons and errors."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.stub_server import running


def loadtest(*arguments: str | Path, status: int = 0) -> str:
    """Run a subcommand in this process. Return what it prints."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done.output


def test_a_sweep_gives_json_csv_a_report_and_a_comparison(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "result.json"
    prompts.write_text("One day\nTwo days\n")
    with running("--api-key", "sesame", "--token-ms", "1") as server:
        options = ["--server", server, "--concurrency", "1,2", "--stream", "--requests", "10", "--warmup", "0"]
        options += ["--repeat", "2", "-n", "2:0.5,8:0.5", "--prompts", prompts, "--goodput", "ttft<5000,e2e<0.001"]
        assert "UNAUTHENTICATED" in loadtest("run", *options, status=1)
        loadtest("run", *options, "--api-key", "sesame", "--output", output)
    result = json.loads(output.read_text())
    assert "sesame" not in output.read_text()
    assert [(run["load"]["concurrency"], run["repeat"]) for run in result["runs"]] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(run["goodput"]["share"] == 0 and 2 < run["tokens_an_answer"] < 8 for run in result["runs"])
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert [float(row["latency_ms.p99"]) for row in rows] == [run["latency_ms"]["p99"] for run in result["runs"]]

    loadtest("report", output, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    pictures = sorted((tmp_path / "report").glob("*.png"))
    expected = {"load-stream.png", "result-itl-histogram.png", "result-latency-percentiles.png"}
    assert expected <= {picture.name for picture in pictures}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(src|href)=\"?(?!\"?data:)", page)  # the page loads nothing

    compared = loadtest("compare", output, output, "--json")
    assert not {change["verdict"] for change in json.loads(compared)} & {"better", "worse"}


def test_run_is_the_default_command() -> None:
    command = [sys.executable, "-m", "loadtest", "--server", "localhost:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no TinyLM service answers at localhost:1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--concurrency", "x"], "--concurrency is 'x'"),
        (["run", "--concurrency", "1", "--rate", "1"], "exclude"),
        (["run", "--rate", "1", "--arrivals", "even"], "arrivals is 'even'"),
        (["run", "--repeat", "0"], "--repeat is 0"),
        (["selftest", "--duration", "nan"], "--duration is nan"),
        (["compare", "README.md", "README.md"], "README.md is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line_and_name_the_cause(arguments: list[str], named: str) -> None:
    error = loadtest(*arguments, status=1)
    assert named in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1

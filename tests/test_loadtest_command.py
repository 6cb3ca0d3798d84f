"""`python -m loadtest` against real servers: a stub whose delays are known, the engine alone and behind grpc.aio."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import histogram, stub_server
from loadtest.load import Load, Mix
from loadtest.standard import parts, services
from loadtest.stub_server import DRAWS
from loadtest.sweep import Sweep, carry_out
from loadtest.workload import arrivals
from tinylm.client import Client

EIGHT = Mix((8,), (1.0,))


def loadtest(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def one_run(load: Load, **settings) -> dict:
    (run,) = carry_out(Sweep((load,), **settings), quiet=True)
    return run


def test_percentiles_are_those_of_the_delays_that_the_server_has() -> None:
    """Sorted, each latency is at least the delay of the same rank; the steps are so far apart that noise hides none."""
    mix = "10:0.8,1000:0.2"
    with stub_server.running("--delay-ms", mix) as server:
        run = one_run(Load(server, EIGHT, concurrency=20, requests=100, warmup_s=0))
    delays = sorted(Mix.parse(mix, "n").draw(DRAWS, seed=1)[1:101].tolist())
    assert run["requests"] == run["statuses"]["OK"] == 100
    for percent in (50, 90, 95, 99):
        assert run["latency_ms"][f"p{percent}"] >= delays[percent - 1]
    assert run["latency_ms"]["p50"] < 1000


def test_a_stall_shows_from_the_intended_time_and_hides_from_the_sent_one() -> None:
    """Coordinated omission: one request may be open at a time; a third of them are intended while the server stands.

    Half of those waited for more than half the stall. Counted from when they were sent, one did: the others were not
    sent yet. Both figures come from the same calls.
    """
    with stub_server.running("--freeze-after-s", "0.5", "--freeze-s", "1") as server:
        run = one_run(
            Load(server, EIGHT, rate_per_s=100, arrivals="constant", duration_s=3, warmup_s=0, max_in_flight=1)
        )
    assert run["requests"] == run["statuses"]["OK"] == 300
    waits = {}
    for name in ("latency", "latency_from_send"):
        durations_ms, counts = histogram.recorded(histogram.decode(run["histograms"][name]))
        waits[name] = counts[durations_ms >= 500].sum()
    assert waits["latency"] >= 40
    assert waits["latency_from_send"] <= 5
    assert run["latency_ms"]["p90"] >= 500 > run["latency_from_send_ms"]["p90"]
    assert run["sends"]["late"] >= 40


def test_tokens_of_messages_are_counted_or_said_to_be_guessed() -> None:
    def run_against(*arguments: str) -> dict:
        with stub_server.running("--tokens-a-message", "4", "--token-ms", "2", *arguments) as server:
            return one_run(Load(server, EIGHT, concurrency=2, stream=True, requests=10, warmup_s=0))

    counted, guessed = run_against(), run_against("--untold")
    assert not guessed["messages"]["tokens_of_each_known"]
    assert counted["messages"] == {"tokens_a_message": 4.0, "tokens_of_each_known": True}
    for run in (guessed, counted):
        assert run["tokens_an_answer"] == 8
        assert run["gap_ms"]["p50"] >= 8  # four tokens of 2 ms
        assert histogram.decode(run["histograms"]["gap"]).get_total_count() == 10
    assert counted["itl_ms"]["p50"] >= 2
    assert histogram.decode(counted["histograms"]["itl"]).get_total_count() == 10 * 4  # those after the first message


@pytest.mark.parametrize("settings", [{"concurrency": 5, "requests": 50}, {"rate_per_s": 60.0, "duration_s": 1.0}])
def test_several_processes_do_the_work_of_one(settings: dict) -> None:
    with stub_server.running() as server:
        load = Load(server, EIGHT, warmup_s=0.2, **settings)
        run = one_run(load, n_processes=3)
    expected = 50 if load.requests else int((arrivals(load) >= 0).sum())
    assert run["requests"] == run["statuses"]["OK"] == expected
    assert run["client"]["processes"] == 3
    assert run["server"]["by_role"].keys() == {"server"}


def test_a_sweep_becomes_json_csv_page_and_pictures(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "result.json"
    prompts.write_text("One day\nTwo days\n")
    with stub_server.running("--api-key", "sesame", "--token-ms", "1") as server:
        options = ["--server", server, "--concurrency", "1,2", "--stream", "--requests", "10", "--warmup", "0"]
        options += ["--repeat", "2", "-n", "2:0.5,8:0.5", "--prompts", prompts, "--goodput", "ttft<5000,e2e<0.001"]
        refused = loadtest(*options, status=1)
        loadtest(*options, "--api-key", "sesame", "--output", output)
    assert "UNAUTHENTICATED" in refused.stderr
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
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(src|href)=\"?(?!\"?data:)", page)  # it holds everything in itself
    compared = loadtest("compare", output, output, "--json").stdout
    assert not {change["verdict"] for change in json.loads(compared)} & {"better", "worse"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--concurrency", "x"], "--concurrency is 'x'"),
        (["--concurrency", "1", "--rate", "1"], "exclude"),
        (["--rate", "1", "--arrivals", "even"], "--arrivals is 'even'"),
        (["--server", "localhost:1"], "localhost:1"),
        (["compare", "README.md", "README.md"], "README.md is no JSON"),
        (["standard", "--only", "nothing"], "'nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_one_line_that_names_its_cause(arguments: list[str], named: str) -> None:
    error = loadtest(*arguments, status=1).stderr
    assert named in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_the_standard_set_goes_on_where_it_stopped(tmp_path: Path) -> None:
    part = parts.Part("engine", "a stub", stub_server.running)
    settings = parts.Settings(tmp_path, duration_s=0.3, warmup_s=0, repeats=2, concurrency=(1,))
    parts.carry_out([part], settings, again=False, quiet=True)
    (tmp_path / "engine-stream.json").unlink()
    before = (tmp_path / "engine-unary.json").read_bytes()
    parts.carry_out([part], settings, again=False, quiet=True)
    assert (tmp_path / "engine-unary.json").read_bytes() == before
    assert [run["repeat"] for run in json.loads((tmp_path / "engine-stream.json").read_text())["runs"]] == [0, 1]
    assert (tmp_path / "load-unary.png").exists()
    assert parts.to_do(part, settings, again=False) == []
    assert parts.to_do(part, dataclasses.replace(settings, repeats=1), again=False) == [False, True]
    assert parts.to_do(part, settings, again=True) == [False, True]


def test_the_engine_alone_is_measured_without_a_server() -> None:
    run = one_run(Load("engine:models/stories-8m", EIGHT, concurrency=3, stream=True, requests=12, warmup_s=0))
    assert run["statuses"] == {"OK": 12}
    assert run["messages"]["tokens_of_each_known"]
    assert run["server"]["cores"] is None


def test_what_a_service_adds_is_told_by_rounds_of_both(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    with services.bare(1) as address:
        brief = ("--duration", "0.3", "--warmup", "0.1", "--repeat", "3", "--quiet", "--output", out)
        loadtest("overhead", "--server", address, "-n", "8", *brief)
    result = json.loads(out.read_text())
    runs = result["runs"]
    assert [(run["load"]["protocol"], run["load"]["stream"], run["repeat"]) for run in runs] == [
        (protocol, stream, repeat)
        for repeat in range(3)
        for protocol, stream in (("engine", False), ("grpc", False), ("grpc", True))
    ]
    p50 = [run["latency_ms"]["p50"] for run in runs]
    differences = sorted(p50[3 * i + 1] - p50[3 * i] for i in range(3))
    assert result["overhead_p50_ms"] == pytest.approx(differences[1], abs=1e-3)
    first = sorted(run["ttft_ms"]["p50"] for run in runs[2::3])
    assert result["first_token_p50_ms"] == pytest.approx(first[1], abs=1e-3)


def test_the_bare_server_gives_the_library_s_text_from_all_its_processes(stories, greedy) -> None:
    expected = stories.generate("Once upon a time", greedy)[0]
    seen = set()
    with services.bare(2) as address:
        for _ in range(20):  # the kernel picks a process for each connection by chance
            with Client(address, retries=0) as client:
                answer = client.generate("Once upon a time", greedy)
                streamed = "".join(client.stream("Once upon a time", greedy))
            assert answer.text == streamed == expected.text
            seen.add(answer.replica)
    assert len(seen) == 2

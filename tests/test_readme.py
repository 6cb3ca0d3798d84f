"""The README and the docs promise files and figures: each is held to what is there. Commands: `test_docs_commands`."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

from loadtest.bench.speed_page import PartResult
from train.quantization_study import markdown

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
MAKEFILE = Path("Makefile").read_text(encoding="utf-8")
RESULTS = Path("docs/results")


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))


def modules_named(page: str) -> set[str]:
    return set(re.findall(r"python -m ((?:train|loadtest)[\w.]*)", page))


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_every_make_command_is_a_target(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", page)) | set(re.findall(r"^ *make ([a-z-]+)", page, re.MULTILINE))
    assert named <= targets()


def test_the_readme_s_two_commands_are_there() -> None:
    page = Path("README.md").read_text(encoding="utf-8")
    assert {"make serve", "make test"} <= set(re.findall(r"^(make [a-z-]+)", page, re.MULTILINE))


def test_every_module_that_is_named_has_a_help_text() -> None:
    modules = sorted(set().union(*(modules_named(page.read_text("utf-8")) for page in PAGES)))

    def help_of(module: str) -> str:
        command = [sys.executable, "-m", module, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(2) as pool:  # each takes seconds to import what it needs
        told = dict(zip(modules, pool.map(help_of, modules), strict=True))
    assert len(told) > 10
    assert [module for module, text in told.items() if f"python -m {module}" not in text] == []


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_every_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_file_tree_is_the_one_that_git_has() -> None:
    page = Path("docs/map.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```tree\n(.*?)```", page, re.DOTALL)
    folder, listed = "", set()
    for line in block.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        listed.add(folder + name)
        if name.endswith("/") and not line.startswith(" "):
            folder = name
    assert [name for name in sorted(listed) if not Path(name).exists()] == []
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    code = {name for name in tracked if re.fullmatch(r"(tinylm|train|loadtest|docs/making)/\w+\.py", name)} - {
        f"{package}/__init__.py" for package in ("tinylm", "train", "loadtest")
    }
    assert sorted(code - listed) == []


def test_the_table_s_figures_are_those_of_the_committed_results() -> None:
    page = Path("README.md").read_text(encoding="utf-8")
    for name, config in (("haproxy", "serve"), ("python-proxy", "serve-python-proxy")):
        part = PartResult(RESULTS / "standard", name, "unary")
        assert part.result["replicas"] == 4
        for clients in (4, 16):
            rate, p50 = part.mean(clients, "requests_per_s"), part.mean(clients, "latency_ms", "p50")
            p99 = part.worst(clients, "latency_ms", "p99")
            assert f"`configs/{config}.yaml` | {clients} | {rate:.1f} | {p50:.0f} ms | {p99:.0f} ms |" in page


def test_the_readme_s_other_figures_are_those_of_the_committed_results() -> None:
    page = " ".join(Path("README.md").read_text(encoding="utf-8").split())
    fresh, bench, peers = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("fresh-clone", "bench", "peers")
    )
    serve, test = fresh["make_serve"], fresh["make_test"]
    assert f"{serve['seconds_until_ready']} seconds and {serve['downloaded']['megabytes']} MB" in page
    assert f"({test['downloaded']['megabytes']} MB more)" in page
    rates = {row["batch"]: f"{row['tokens_per_s']:,.0f}" for row in bench["decode"]}
    assert f"decodes {rates[1]} tokens/s for one sequence and {rates[16]} for sixteen at once" in page
    ratios = {name: f"{ratio:.2f}" for name, ratio in peers["ratios"]["tinylm / best of the others"].items()}
    assert f"{ratios['decode 1']} times as fast" in page
    assert f"{ratios['decode 4']} times at 4, {ratios['decode 8']} at 8, {ratios['decode 16']} at 16" in page
    assert f"{ratios['prefill 192']} times for the prompt" in page
    evaluation = json.loads(Path("models/stories-8m/evaluation.json").read_text(encoding="utf-8"))
    assert f"{evaluation['tokens_seen'] / 1e6:.1f} million tokens" in page
    for name, score in evaluation["collections"].items():
        assert f"| {name} | {score['bits_per_byte']:.4f} |" in page


def test_the_model_card_s_figures_are_those_of_its_evaluation() -> None:
    directory = Path("models/stories-8m")
    card = (directory / "README.md").read_text(encoding="utf-8")
    evaluation = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    assert f"{evaluation['tokens_seen']:,} tokens seen" in card
    for name, score in evaluation["collections"].items():
        assert re.search(rf"\| {name} \|.*\| {score['bits_per_byte']:.4f} \|", card)


def test_the_training_page_s_table_is_the_committed_result() -> None:
    result = json.loads((RESULTS / "quantization.json").read_text(encoding="utf-8"))
    assert markdown(result) in Path("docs/training.md").read_text(encoding="utf-8")


def test_what_http_costs_is_that_of_the_committed_results() -> None:
    page = Path("docs/http.md").read_text(encoding="utf-8")
    p50 = {}
    for face in ("grpc", "http"):
        result = json.loads((RESULTS / f"face-{face}.json").read_text(encoding="utf-8"))
        assert {run["load"]["concurrency"] for run in result["runs"]} == {1}
        p50[face] = median(run["latency_ms"]["p50"] for run in result["runs"])
    assert f"{p50['grpc']:.1f} ms at p50 over gRPC and {p50['http']:.1f} over HTTP" in page
    assert p50["http"] - p50["grpc"] < 5

"""Runs as tables for people, and what weakens their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WAITING = 0.05  # of the time: a load generator that waited longer for a core has seen answers late
STREAM_FIGURES = (("ttft", ("p50", "p99")), ("tpot", ("p50", "p99")), ("itl", ("p50", "p99")), ("gap", ("p99", "max")))


def show(runs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One row a run; streams get a second table; then what a reader must know before trusting the figures."""
    goodput = any("goodput" in run for run in runs)
    table = _table("load", "req/s", "tokens/s", "p50 ms", "p99 ms", "max ms", "not OK", "replicas", "client", "server")
    table.title = "latency end to end; CPU cores that client and server used"
    if goodput:
        table.add_column("goodput", justify="right")
    for run in runs:
        failed = run["requests"] - run["statuses"].get("OK", 0)
        cores = run["server"]["cores"]
        figures = [load_name(run), f"{run['requests_per_s']:.1f}", f"{run['tokens_per_s']:.0f}"]
        figures += [ms(run["latency_ms"], name) for name in ("p50", "p99", "max")]
        figures += [str(failed), str(len(run["replicas"])), f"{run['client']['cores']:.2f}"]
        figures.append("?" if cores is None else f"{cores:.2f}")
        if goodput:
            figures.append(f"{run['goodput']['requests_per_s']:.1f}/s {run['goodput']['share']:.0%}")
        table.add_row(*figures)
    console.print(table)
    if streams := [run for run in runs if run["load"]["stream"]]:
        names = [f"{name} {figure}" for name, figures in STREAM_FIGURES for figure in figures]
        table = _table("load", *names)
        table.title = "streams, ms"
        for run in streams:
            shown = [ms(run[f"{name}_ms"], figure) for name, figures in STREAM_FIGURES for figure in figures]
            table.add_row(load_name(run), *shown)
        console.print(table)
    for note in notes(runs):
        console.print(f"note: {note}", style="yellow")


def load_name(run: Mapping[str, Any]) -> str:
    """ "16 clients" or "200/s"."""
    load = run["load"]
    n = load["concurrency"]
    return f"{n} client{'s' if n > 1 else ''}" if n else f"{load['rate_per_s']:g}/s"


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What weakens the figures of these runs, one sentence each."""
    found = []
    failed: dict[str, int] = {}
    for run in runs:
        for status, count in run["statuses"].items():
            failed[status] = failed.get(status, 0) + count
    failed.pop("OK", None)
    if failed:
        found.append("not OK: " + ", ".join(f"{status} {count}" for status, count in failed.items()))
        found += [
            f"{load_name(run)}: {status} came after {ms(figures, 'p50')} ms at p50, {ms(figures, 'p99')} ms at p99"
            for run in runs
            for status, figures in run["failures_ms"].items()
        ]
    if busy := [run for run in runs if run["client"]["too_busy"]]:
        most = max(run["client"]["busiest_process"] for run in busy)
        found.append(f"{len(busy)} runs kept a process of the load generator {most:.0%} busy: it may be the limit")
    if starved := [run for run in runs if run["client"]["longest_waiting"] > WAITING]:
        longest = max(run["client"]["longest_waiting"] for run in starved)
        found.append(
            f"in {len(starved)} runs the load generator waited for a core for up to {longest:.0%} of the time: "
            "latencies contain that"
        )
    if late := sum(run.get("sends", {}).get("late", 0) for run in runs):
        worst = max(run["sends"]["latest_ms"] for run in runs if "sends" in run)
        found.append(f"{late} requests were sent late, by up to {worst:.0f} ms; their latency counts from the plan")
    for run in runs:
        unfinished = run.get("unfinished")
        if unfinished and unfinished["longest_ms"] > 2 * run["latency_ms"].get("max", 0):
            found.append(
                f"{load_name(run)}: {unfinished['requests']} requests were open at the end, one of which took "
                f"{unfinished['longest_ms']:.0f} ms, longer than any that is counted"
            )
    if any(not run["messages"]["tokens_of_each_known"] for run in runs if "messages" in run):
        found.append("messages carried several tokens: itl is spread evenly over them")
    unknown = {run["server"]["unknown"] for run in runs if run["server"]["cores"] is None}
    found += [f"the server's CPU is unknown: {reason}" for reason in sorted(unknown)]
    return found


def ms(figures: Mapping[str, float] | None, name: str) -> str:
    """A figure in three digits or so, "-" where there is none."""
    if not figures:
        return "-"
    value = figures[name]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return table

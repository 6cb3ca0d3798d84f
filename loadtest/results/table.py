"""Print runs as tables, with notes on what makes their figures unreliable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

WAITING = 0.05  # share of the time: a load generator that waits longer for a core sees answers late
STREAM_FIGURES = (("ttft", ("p50", "p99")), ("tpot", ("p50", "p99")), ("itl", ("p50", "p99")), ("gap", ("p99", "max")))
Run = Mapping[str, Any]


def show(runs: Sequence[Run], console: Console) -> None:
    """Print a table with one row per run, a second table for streams, and the notes."""
    console.print(_runs_table(runs))
    if streams := [run for run in runs if run["load"]["stream"]]:
        names = [f"{name} {figure}" for name, figures in STREAM_FIGURES for figure in figures]
        table = make_table("streams, ms", "load", *names)
        for run in streams:
            shown = [ms(run[f"{name}_ms"], figure) for name, figures in STREAM_FIGURES for figure in figures]
            table.add_row(load_name(run), *shown)
        console.print(table)
    for note in notes(runs):
        console.print(f"note: {note}", style="yellow")


def _runs_table(runs: Sequence[Run]) -> Table:
    columns = ["load", "req/s", "tokens/s", "p50 ms", "p99 ms", "max ms", "not OK", "replicas", "client", "server"]
    has_goodput = any("goodput" in run for run in runs)
    if has_goodput:
        columns.append("goodput")
    table = make_table("latency end to end; CPU cores that client and server used", *columns)
    for run in runs:
        failed = run["requests"] - run["statuses"].get("OK", 0)
        cores = run["server"]["cores"]
        figures = [load_name(run), f"{run['requests_per_s']:.1f}", f"{run['tokens_per_s']:.0f}"]
        figures += [ms(run["latency_ms"], name) for name in ("p50", "p99", "max")]
        figures += [str(failed), str(len(run["replicas"])), f"{run['client']['cores']:.2f}"]
        figures.append("?" if cores is None else f"{cores:.2f}")
        if has_goodput:
            figures.append(f"{run['goodput']['requests_per_s']:.1f}/s {run['goodput']['share']:.0%}")
        table.add_row(*figures)
    return table


def make_table(title: str, *columns: str, justify: Literal["left", "right"] = "right") -> Table:
    """Return an empty table. justify: for all columns but the first, which is aligned to the left."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify=justify)
    return table


def load_name(run: Run) -> str:
    """Return "16 clients" or "200/s"."""
    load = run["load"]
    n = load["concurrency"]
    return f"{n} client{'s' if n > 1 else ''}" if n else f"{load['rate_per_s']:g}/s"


def ms(figures: Mapping[str, float] | None, name: str) -> str:
    """Return a figure with about three digits, or "-" if there is none."""
    if not figures:
        return "-"
    value = figures[name]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def notes(runs: Sequence[Run]) -> list[str]:
    """Return what makes the figures of these runs unreliable, one sentence each."""
    return [*_notes_on_calls(runs), *_notes_on_client(runs), *_notes_on_server(runs)]


def _notes_on_calls(runs: Sequence[Run]) -> Iterator[str]:
    statuses = sum((Counter(run["statuses"]) for run in runs), Counter[str]())
    if failed := {status: count for status, count in statuses.items() if status != "OK"}:
        yield "not OK: " + ", ".join(f"{status} {count}" for status, count in failed.items())
    for run in runs:
        for status, figures in run["failures_ms"].items():
            p50, p99 = ms(figures, "p50"), ms(figures, "p99")
            yield f"{load_name(run)}: {status} came after {p50} ms at p50, {p99} ms at p99"
    for run in runs:
        unfinished = run.get("unfinished")
        if unfinished and unfinished["longest_ms"] > 2 * run["latency_ms"].get("max", 0):
            yield (
                f"{load_name(run)}: {unfinished['requests']} requests were open at the end; one took "
                f"{unfinished['longest_ms']:.0f} ms, longer than every counted request"
            )
    if any(not run["messages"]["tokens_of_each_known"] for run in runs if "messages" in run):
        yield "messages carried several tokens: itl is spread evenly over them"


def _notes_on_client(runs: Sequence[Run]) -> Iterator[str]:
    if busy := [run["client"]["busiest_process"] for run in runs if run["client"]["too_busy"]]:
        yield f"{len(busy)} runs kept a process of the load generator {max(busy):.0%} busy: it may be the limit"
    if waited := [share for run in runs if (share := run["client"]["longest_waiting"]) > WAITING]:
        yield (
            f"in {len(waited)} runs the load generator waited for a core for up to {max(waited):.0%} of the time: "
            "latencies include that time"
        )
    sends = [run["sends"] for run in runs if "sends" in run]
    if late := sum(send["late"] for send in sends):
        worst = max(send["latest_ms"] for send in sends)
        yield f"{late} requests were sent late, by up to {worst:.0f} ms; latency counts from the intended time"


def _notes_on_server(runs: Sequence[Run]) -> Iterator[str]:
    unknown = {run["server"]["unknown"] for run in runs if run["server"]["cores"] is None}
    for reason in sorted(unknown):
        yield f"the server's CPU is unknown: {reason}"

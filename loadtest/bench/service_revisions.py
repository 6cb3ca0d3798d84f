"""Compare the service with that of another revision: requests/s, latency, and the CPU time of an answer by part.

    python -m loadtest.bench.service_revisions bf112a5 --out docs/results/service-revisions.json

Both services run all the time. They get load in turn: old, new, new, old. The CPU time of an answer is the time that a
part used in a measurement, divided by the number of answers. Early revisions give the engines' threads no name. Their
time counts as the replicas'.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional

import typer
from rich.table import Table

from loadtest.bench import services
from loadtest.bench.revisions import worktree
from loadtest.load import Load, Mix
from loadtest.options import command_errors, require_at_least
from loadtest.sweep import Sweep, run_sweep
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import PlainConsole, say

CONFIG = Path("configs/serve.yaml")
REPLICAS, CLIENTS, TOKENS = 4, 16, 64
WARMUP_S, PAUSE_S = 2.0, 1.0


def measure(address: str, seconds: float) -> dict[str, Any]:
    """Return the requests per second, the latency, and the CPU milliseconds of an answer by part."""
    load = Load(address, Mix((TOKENS,), (1.0,)), CLIENTS, ignore_eos=True, duration_s=seconds, warmup_s=WARMUP_S)
    (run,) = run_sweep(Sweep((load,)), quiet=True)
    rate, latency = run["requests_per_s"], run["latency_ms"]
    cores = {**run["server"]["by_role"], "load generator": run["client"]["cores"]}
    return {
        "requests_per_s": rate,
        "p50_ms": latency["p50"],
        "p99_ms": latency["p99"],
        "cpu_ms": {part: round(1000 * used / rate, 3) for part, used in cores.items()},
    }


def compare(old: str, new: str, pairs: int, seconds: float) -> list[dict[str, dict[str, Any]]]:
    """Return the measurements of each pair."""
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(pairs):
        order = {"old": old, "new": new} if number % 2 == 0 else {"new": new, "old": old}
        found.append({})
        for name, address in order.items():
            found[-1][name] = measure(address, seconds)
            time.sleep(PAUSE_S)
        rates = {name: found[-1][name]["requests_per_s"] for name in ("old", "new")}
        say(f"pair {number + 1} of {pairs}: {rates['old']:.1f} and {rates['new']:.1f} requests/s")
    return found


def summary(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians, the medians of the pairs' ratios (new to old), and the CPU time by part of both revisions."""
    figures = ("requests_per_s", "p50_ms", "p99_ms")
    rows: dict[str, Any] = {
        figure: {
            "old": round(median(pair["old"][figure] for pair in pairs), 3),
            "new": round(median(pair["new"][figure] for pair in pairs), 3),
            "ratio": round(median(pair["new"][figure] / pair["old"][figure] for pair in pairs), 4),
        }
        for figure in figures
    }
    for name in ("old", "new"):
        parts = dict.fromkeys(part for pair in pairs for part in pair[name]["cpu_ms"])
        rows[f"cpu_ms_{name}"] = {
            part: round(median(pair[name]["cpu_ms"].get(part, 0.0) for pair in pairs), 3) for part in parts
        }
    return rows


def main(
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="The other revision, as git names it.")],
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    pairs: Annotated[int, typer.Option(help="Measurements of each revision.")] = 6,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 12.0,
) -> None:
    """Compare the service with that of another revision."""
    with command_errors():
        require_at_least(1, pairs=pairs, seconds=seconds)
        if out:
            check_file(out)
        with ExitStack() as stack:
            trees = {"old": stack.enter_context(worktree(revision)), "new": None}
            old, new = (
                stack.enter_context(services.ray_service((tree or Path()) / CONFIG, REPLICAS, tree)).address
                for tree in trees.values()
            )
            found = compare(old, new, pairs, seconds)
    rows = summary(found)
    _show(rows)
    if out:
        command = f"python -m loadtest.bench.service_revisions {revision} --out {out}"
        settings = {"replicas": REPLICAS, "clients": CLIENTS, "tokens": TOKENS, "seconds": seconds}
        facts = {**describe(), "command": command, "other_revision": revision, "settings": settings}
        write_file(out, json.dumps({**facts, **rows, "pairs": found}, indent=2) + "\n")


def _show(rows: dict[str, Any]) -> None:
    table = Table("", "old", "new", "ratio")
    for figure in ("requests_per_s", "p50_ms", "p99_ms"):
        row = rows[figure]
        table.add_row(figure, f"{row['old']:.1f}", f"{row['new']:.1f}", f"{row['ratio']:.3f}")
    for part in dict.fromkeys([*rows["cpu_ms_old"], *rows["cpu_ms_new"]]):
        values = [rows[f"cpu_ms_{name}"].get(part) for name in ("old", "new")]
        table.add_row(f"CPU ms of an answer: {part}", *("" if value is None else f"{value:.2f}" for value in values))
    PlainConsole().print(table)


if __name__ == "__main__":  # the processes of the load generator import this module too
    typer.run(main)

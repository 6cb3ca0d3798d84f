"""What a service does that is asked for more than it can: `python -m loadtest overload`.

First as many clients as it holds, so that it is full and refuses nobody; then the same answers wanted at a multiple of
the rate that it reached, whatever comes back. It should go on as fast for those it takes, and refuse the rest at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.sweep import Sweep, carry_out
from loadtest.table import show as show_runs


def measure(full: Load, factor: float, rounds: int, n_processes: int | None, quiet: bool) -> dict[str, Any]:
    """Rounds of both loads, by turns, and what came of it. full: a closed loop of what the service holds.

    Raises ValueError when the service refused some of these already, or none of the others.
    """
    runs: list[dict[str, Any]] = []
    for _ in range(rounds):
        runs += carry_out(Sweep((full,), n_processes=n_processes), quiet)
        if set(runs[-1]["statuses"]) != {"OK"}:
            raise ValueError(f"it was to be full and refuse nobody, but {runs[-1]['statuses']}: give fewer --clients")
        rate = factor * runs[-1]["requests_per_s"]
        above = dataclasses.replace(full, concurrency=None, rate_per_s=rate, connections=full.n_connections)
        runs += carry_out(Sweep((above,), n_processes=n_processes), quiet)
        if "RESOURCE_EXHAUSTED" not in runs[-1]["statuses"]:
            raise ValueError(f"{rate:.0f} requests/s were not too many: {runs[-1]['statuses']}; give a higher --factor")
    return {"kept_throughput": _kept(runs), "refused_p99_ms": _refused(runs), "runs": runs}


def _kept(runs: list[dict[str, Any]]) -> list[float]:
    """Of each round, the throughput above the limit over that at the limit, in tokens a second."""
    rounds = zip(runs[::2], runs[1::2], strict=True)
    return [round(above["tokens_per_s"] / at["tokens_per_s"], 3) for at, above in rounds]


def _refused(runs: list[dict[str, Any]]) -> list[float]:
    return [above["failures_ms"]["RESOURCE_EXHAUSTED"]["p99"] for above in runs[1::2]]


def show(result: dict[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    for kept, refused in zip(result["kept_throughput"], result["refused_p99_ms"], strict=True):
        console.print(f"above its limit it kept {kept:.0%} of its throughput; refusals came in {refused:.1f} ms (p99)")

"""What a service does that is asked for more than it can: `python -m loadtest overload`.

First as many clients as it holds, so that it is full and refuses nobody; then the same answers wanted at multiples of
the rate that it reached, whatever comes back. It should go on as fast for those it takes, and refuse the rest at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.sweep import Sweep, carry_out
from loadtest.table import show as show_runs


def measure(full: Load, factors: Sequence[float], rounds: int, n_processes: int | None, quiet: bool) -> dict[str, Any]:
    """Rounds of the full load and of each multiple, and what came of them. full: a closed loop of what it holds.

    Raises ValueError when the service refused some of these already, or none of the others.
    """
    runs: list[dict[str, Any]] = []
    above: dict[float, list[dict[str, Any]]] = {factor: [] for factor in factors}
    for _ in range(rounds):
        runs += carry_out(Sweep((full,), n_processes=n_processes), quiet)
        at = runs[-1]
        if set(at["statuses"]) != {"OK"}:
            raise ValueError(f"it was to be full and refuse nobody, but {at['statuses']}: give fewer --clients")
        for factor in factors:
            rate = factor * at["requests_per_s"]
            load = dataclasses.replace(full, concurrency=None, rate_per_s=rate, connections=full.n_connections)
            runs += carry_out(Sweep((load,), n_processes=n_processes), quiet)
            if "RESOURCE_EXHAUSTED" not in (statuses := runs[-1]["statuses"]):
                raise ValueError(f"{rate:.0f} requests/s were not too many: {statuses}; give a higher --factor")
            above[factor].append(_against(runs[-1], at))
    return {"above": [{"factor": factor, "rounds": found} for factor, found in above.items()], "runs": runs}


def _against(above: dict[str, Any], at: dict[str, Any]) -> dict[str, float | None]:
    """What was kept of the throughput at the limit: of tokens/s, and of tokens/s for each core that the service had.

    On one machine the load generator takes from the service's cores, more when it asks more: the latter leaves it out.
    """
    cores, cores_before = above["server"]["cores"], at["server"]["cores"]
    kept = above["tokens_per_s"] / at["tokens_per_s"]
    return {
        "refused_per_s": round(above["statuses"]["RESOURCE_EXHAUSTED"] / above["window_s"], 1),
        "refused_p99_ms": above["failures_ms"]["RESOURCE_EXHAUSTED"]["p99"],
        "kept_throughput": round(kept, 3),
        "kept_throughput_a_core": round(kept * cores_before / cores, 3) if cores and cores_before else None,
    }


def show(result: dict[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    for above in result["above"]:
        for found in above["rounds"]:
            a_core = found["kept_throughput_a_core"]
            console.print(
                f"{above['factor']:g} times: kept {found['kept_throughput']:.0%} of its throughput"
                + (f", {a_core:.0%} of that of a core" if a_core else "")
                + f"; {found['refused_per_s']:.0f} refusals/s came in {found['refused_p99_ms']:.1f} ms (p99)"
            )

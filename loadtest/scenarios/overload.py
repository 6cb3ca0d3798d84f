"""Ask for more than a service can do: how much it still answers, and how soon it refuses the rest.

Each round begins with as many clients as the service holds, so that it is full and refuses nothing. Open loops follow:
at the highest rate at which it still refuses nothing, and at multiples of the rate that the clients reached.

The result gives both rates, because they differ: clients that wait for their answers come and go in step with the
batches of the engine, and cost less than calls at random moments. The cost of refusing shows against the latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.results.table import show as show_runs
from loadtest.sweep import Sweep, carry_out

LESS = 0.9  # factor from a rate that was refused to the next one that is tried
REFUSED = "RESOURCE_EXHAUSTED"


class _Runs:
    """The runs so far, in order."""

    def __init__(self, n_processes: int | None, quiet: bool) -> None:
        self.made: list[dict[str, Any]] = []
        self._n_processes, self._quiet = n_processes, quiet

    def make(self, load: Load) -> dict[str, Any]:
        self.made += carry_out(Sweep((load,), n_processes=self._n_processes), self._quiet)
        return self.made[-1]


def measure(full: Load, factors: Sequence[float], rounds: int, n_processes: int | None, quiet: bool) -> dict[str, Any]:
    """Return the runs of all rounds, and what each factor led to.

    full: a closed loop with as many clients as the service holds. Raises ValueError if the service refuses some of
    them, or if it refuses nothing at a multiple of their rate.
    """
    runs = _Runs(n_processes, quiet)
    above: dict[float, list[dict[str, float | None]]] = {factor: [] for factor in factors}
    share = 1.0  # of the clients' rate, at which the service refuses nothing
    for _ in range(rounds):
        closed = runs.make(full)
        if set(closed["statuses"]) != {"OK"}:
            raise ValueError(f"the service must refuse none of the clients: {closed['statuses']}: give fewer --clients")
        share = min(1.0, share / LESS)  # the share of the last round may be too low for this one
        while REFUSED in (carried := runs.make(_arriving(full, closed, share)))["statuses"]:
            share *= LESS
        for factor in factors:
            if REFUSED not in (found := runs.make(_arriving(full, closed, factor)))["statuses"]:
                raise ValueError(f"{factor:g} times the rate was not too much: {found['statuses']}: raise --factor")
            above[factor].append(_against(found, carried, closed))
    return {"above": [{"factor": factor, "rounds": found} for factor, found in above.items()], "runs": runs.made}


def _arriving(full: Load, closed: Mapping[str, Any], factor: float) -> Load:
    """Return an open loop at a multiple of the rate that the clients reached."""
    rate = factor * closed["requests_per_s"]
    return dataclasses.replace(full, concurrency=None, rate_per_s=rate, connections=full.n_connections)


def _against(
    above: Mapping[str, Any], carried: Mapping[str, Any], closed: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return how much throughput the service kept, of the highest rate without refusals and of the clients.

    On one machine the load generator takes more of the cores when it asks for more. The throughput that is kept per
    core of the service leaves that out.
    """
    cores, cores_before = above["server"]["cores"], carried["server"]["cores"]
    kept = above["tokens_per_s"] / carried["tokens_per_s"]
    return {
        "refused_per_s": round(above["statuses"][REFUSED] / above["window_s"], 1),
        "refused_p99_ms": above["failures_ms"][REFUSED]["p99"],
        "kept_throughput": round(kept, 3),
        "kept_throughput_a_core": round(kept * cores_before / cores, 3) if cores and cores_before else None,
        "kept_of_closed_loop": round(above["tokens_per_s"] / closed["tokens_per_s"], 3),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    clients = result["runs"][0]["load"]["concurrency"]
    for above in result["above"]:
        for found in above["rounds"]:
            per_core = found["kept_throughput_a_core"]
            console.print(
                f"{above['factor']:g} times: kept {found['kept_throughput']:.0%} of its throughput"
                + (f" ({per_core:.0%} per core)" if per_core else "")
                + f", {found['kept_of_closed_loop']:.0%} of that of {clients} clients"
                + f"; {found['refused_per_s']:.0f} refusals/s came in {found['refused_p99_ms']:.1f} ms (p99)"
            )

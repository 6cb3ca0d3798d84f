"""What a service does that is asked for more than it can: `python -m loadtest overload`.

First as many clients as it holds, so that it is full and refuses nobody; then open loops: at the highest rate at which
still nobody is refused, and at multiples of the rate that the clients reached, whatever comes back. It should go on as
fast for those it takes, and refuse the rest at once.

Both rates are told because they differ: clients that wait for their answers come and go in step with the engine's
batches, and are answered at less cost than calls that arrive at random moments. What refusing costs is seen against the
latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.sweep import Sweep, carry_out
from loadtest.table import show as show_runs

LESS = 0.9  # of a rate that was refused, for the next try at one that isn't
REFUSED = "RESOURCE_EXHAUSTED"


def measure(full: Load, factors: Sequence[float], rounds: int, n_processes: int | None, quiet: bool) -> dict[str, Any]:
    """Rounds of the full load, the highest rate without refusals, and each multiple, and what came of them.

    full: a closed loop of what the service holds. Raises ValueError when it refused some of these already, or none of
    those that were to be too many.
    """
    runs: list[dict[str, Any]] = []
    above: dict[float, list[dict[str, Any]]] = {factor: [] for factor in factors}

    def run(load: Load) -> dict[str, Any]:
        runs.extend(carry_out(Sweep((load,), n_processes=n_processes), quiet))
        return runs[-1]

    share = 1.0
    for _ in range(rounds):
        closed = run(full)
        if set(closed["statuses"]) != {"OK"}:
            raise ValueError(f"it was to be full and refuse nobody, but {closed['statuses']}: give fewer --clients")

        def arriving(factor: float, clients_rate: float = closed["requests_per_s"]) -> Load:
            rate = factor * clients_rate
            return dataclasses.replace(full, concurrency=None, rate_per_s=rate, connections=full.n_connections)

        share = min(1.0, share / LESS)  # the last round's may be too low for this one
        while REFUSED in (carried := run(arriving(share)))["statuses"]:
            share *= LESS
        for factor in factors:
            if REFUSED not in (found := run(arriving(factor)))["statuses"]:
                raise ValueError(f"{factor:g} times its rate was not too much: {found['statuses']}: raise --factor")
            above[factor].append(_against(found, carried, closed))
    return {"above": [{"factor": factor, "rounds": found} for factor, found in above.items()], "runs": runs}


def _against(above: dict[str, Any], carried: dict[str, Any], closed: dict[str, Any]) -> dict[str, float | None]:
    """What was kept of the tokens/s: of the highest rate without refusals, and of the clients that it just held.

    On one machine the load generator takes from the service's cores, more when it asks more: what is kept of the
    tokens/s for each core that the service had leaves that out.
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


def show(result: dict[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    for above in result["above"]:
        for found in above["rounds"]:
            a_core = found["kept_throughput_a_core"]
            console.print(
                f"{above['factor']:g} times: kept {found['kept_throughput']:.0%} of its throughput"
                + (f" ({a_core:.0%} of that of a core)" if a_core else "")
                + f", {found['kept_of_closed_loop']:.0%} of that of {result['runs'][0]['load']['concurrency']} clients"
                + f"; {found['refused_per_s']:.0f} refusals/s came in {found['refused_p99_ms']:.1f} ms (p99)"
            )

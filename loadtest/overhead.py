"""What a service adds to its engine for a lone client: `python -m loadtest overhead`.

The same answers by turns from the engine in the load generator's own process and from the service, in short rounds, so
that the machine's moods fall on both alike: a difference of milliseconds is lost between runs that lie minutes apart.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.sweep import Sweep, carry_out
from loadtest.table import show as show_runs


def measure(lone: Load, model: Path, rounds: int, quiet: bool) -> dict[str, Any]:
    """lone: one client of the service, unary. model: what it serves. Raises ValueError if calls fail."""
    engine = dataclasses.replace(lone, server=f"engine:{model}", api_key=None, ca=None)
    stream = dataclasses.replace(lone, stream=True)
    runs = carry_out(Sweep((engine, lone, stream), rounds, n_processes=1), quiet)
    if failed := [run["statuses"] for run in runs if set(run["statuses"]) != {"OK"}]:
        raise ValueError(f"every call must be answered, but {failed[0]}")
    whole = [run["latency_ms"]["p50"] for run in runs]
    first = [run["ttft_ms"]["p50"] for run in runs[2::3]]
    return {
        "engine_p50_ms": round(median(whole[::3]), 3),
        "service_p50_ms": round(median(whole[1::3]), 3),
        "overhead_p50_ms": round(median(s - e for e, s in zip(whole[::3], whole[1::3], strict=True)), 3),
        "first_token_p50_ms": round(median(first), 3),
        "runs": runs,
    }


def show(result: dict[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    console.print(
        f"engine {result['engine_p50_ms']:.1f} ms, service {result['service_p50_ms']:.1f} ms: "
        f"{result['overhead_p50_ms']:.2f} ms more (median of rounds); "
        f"a stream's first token after {result['first_token_p50_ms']:.2f} ms"
    )

"""Measure what a service adds to its engine for a single client.

Short rounds alternate between the engine in the load generator's own process and the service. Milliseconds would be
lost between runs that lie minutes apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from loadtest.load import Load
from loadtest.results.table import show as show_runs
from loadtest.sweep import Sweep, carry_out


def measure(single: Load, model: Path, rounds: int, quiet: bool) -> dict[str, Any]:
    """Return the runs and the medians over the rounds. Raises ValueError if calls fail.

    single: one client of the service, unary. model: the directory of the model that it serves.
    """
    engine = dataclasses.replace(single, server=f"engine:{model}", api_key=None, ca=None)
    stream = dataclasses.replace(single, stream=True)
    runs = carry_out(Sweep((engine, single, stream), rounds, n_processes=1), quiet)
    if failed := [run["statuses"] for run in runs if set(run["statuses"]) != {"OK"}]:
        raise ValueError(f"every call must be answered, but the statuses are {failed[0]}")
    of_engine, of_service = ([run["latency_ms"]["p50"] for run in runs[i::3]] for i in (0, 1))
    first_token = [run["ttft_ms"]["p50"] for run in runs[2::3]]
    return {
        "engine_p50_ms": round(median(of_engine), 3),
        "service_p50_ms": round(median(of_service), 3),
        "overhead_p50_ms": round(median(s - e for e, s in zip(of_engine, of_service, strict=True)), 3),
        "first_token_p50_ms": round(median(first_token), 3),
        "runs": runs,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    show_runs(result["runs"], console)
    console.print(
        f"engine {result['engine_p50_ms']:.1f} ms, service {result['service_p50_ms']:.1f} ms: "
        f"{result['overhead_p50_ms']:.2f} ms more (median of rounds); "
        f"first token of a stream after {result['first_token_p50_ms']:.2f} ms"
    )

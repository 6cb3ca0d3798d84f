"""Make runs one after the other, and measure the CPU time that each costs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.generator.priority import schedule
from loadtest.generator.process_pool import ProcessPool
from loadtest.live import LiveView
from loadtest.load import Load
from loadtest.measured_server import CpuMeter
from loadtest.results.summary import summarize

BUSY = 0.8  # of a core: a process of the load generator that uses more may be the limit


@dataclass(frozen=True)
class Sweep:
    """Loads in order, `repeats` times over, so that a slow period of the machine affects all loads alike."""

    loads: tuple[Load, ...]
    repeats: int = 1
    n_processes: int | None = None  # None: one, and more for a load that keeps one too busy
    limits: dict[str, float] | None = None  # goodput

    @property
    def seconds(self) -> float:
        """Return about how long it takes. A run by number of requests counts with its `duration_s`."""
        return self.repeats * sum(load.warmup_s + load.duration_s + 0.5 for load in self.loads)


def run_sweep(sweep: Sweep, quiet: bool = False) -> list[dict[str, Any]]:
    """Make all runs, and return them as they stand in a result file."""
    runs = []
    with ProcessPool() as pool, LiveView(len(sweep.loads) * sweep.repeats, quiet) as view:
        needed = dict.fromkeys(range(len(sweep.loads)), sweep.n_processes or 1)
        for repeat in range(sweep.repeats):
            for index, load in enumerate(sweep.loads):
                for n_processes in _attempts(needed[index], may_grow=sweep.n_processes is None):
                    run = _one(pool, load, n_processes, sweep.limits, view)
                    needed[index] = n_processes
                    if not run["client"]["too_busy"]:
                        break
                runs.append({**run, "repeat": repeat})
                view.end()
    return runs


def _attempts(first: int, may_grow: bool) -> Iterator[int]:
    """Yield numbers of processes to try: twice as many each time, but at most one per core."""
    n = first
    yield n
    while may_grow and 2 * n <= (os.cpu_count() or 1):
        n *= 2
        yield n


def _one(
    pool: ProcessPool, load: Load, n_processes: int, limits: dict[str, float] | None, view: LiveView
) -> dict[str, Any]:
    """Make one run."""
    meter = CpuMeter(load.server)
    begin, end = math.inf, math.inf

    def on_begin(moment: float) -> None:
        nonlocal begin, end
        begin, end = moment, math.inf if load.requests else moment + load.duration_s
        view.begin(load, moment)

    schedule(load.comes_first)  # this process too: it must look at the CPU of the server at the right moments
    try:
        done = pool.run(load, n_processes, on_begin, view.tick, lambda: meter.look(begin, end))
        server = meter.finish()
    finally:
        schedule(realtime=False)
    busiest = round(max(process.cpu_cores for process in done), 3)
    return {
        "load": load.as_dict(),
        **summarize(load, [record for process in done for record in process.records], limits),
        "client": {
            "processes": len(done),
            "cores": round(sum(process.cpu_cores for process in done), 3),
            "busiest_process": busiest,
            "scheduling": done[0].scheduling,
            "longest_waiting": round(max(process.waited for process in done), 3),
            # With the protocol "engine", the engine keeps the process busy.
            "too_busy": busiest > BUSY and load.protocol != "engine",
        },
        "server": server,
    }

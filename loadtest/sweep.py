"""A sweep: every load of a list, every repeat of it, one run after the other, each with what it cost in CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loadtest.client.pool import Pool
from loadtest.client.scheduling import schedule
from loadtest.live import LiveView
from loadtest.load import Load
from loadtest.server import CpuMeter
from loadtest.summary import summarize

BUSY = 0.8  # of a core: a generating process that uses more may be what is measured


@dataclass(frozen=True)
class Sweep:
    """Loads in order, `repeats` times over: rounds, so that the machine's moods fall on all loads alike."""

    loads: tuple[Load, ...]
    repeats: int = 1
    n_processes: int | None = None  # None: one, and more for a load that keeps one too busy
    limits: dict[str, float] | None = None  # goodput

    @property
    def seconds(self) -> float:
        """About how long it takes; runs by number count as their `duration_s`."""
        return self.repeats * sum(load.warmup_s + load.duration_s + 0.5 for load in self.loads)


def carry_out(sweep: Sweep, quiet: bool = False, on_run: Callable[[dict], None] = lambda run: None) -> list[dict]:
    """The runs as they stand in a result file; `on_run` gets each as it ends."""
    runs = []
    with Pool() as pool, LiveView(len(sweep.loads) * sweep.repeats, quiet) as view:
        needed = dict.fromkeys(range(len(sweep.loads)), sweep.n_processes or 1)
        for repeat in range(sweep.repeats):
            for index, load in enumerate(sweep.loads):
                for n_processes in _attempts(needed[index], sweep.n_processes is None):
                    run = _one(pool, load, n_processes, sweep.limits, view)
                    needed[index] = n_processes
                    if not run["client"]["too_busy"]:
                        break
                run["repeat"] = repeat
                runs.append(run)
                on_run(run)
                view.end()
    return runs


def _attempts(first: int, may_grow: bool) -> Iterator[int]:
    """Numbers of processes to try: twice as many while one is too busy, at most one a core."""
    n = first
    yield n
    while may_grow and 2 * n <= (os.cpu_count() or 1):
        n *= 2
        yield n


def _one(pool: Pool, load: Load, n_processes: int, limits: dict[str, float] | None, view: LiveView) -> dict[str, Any]:
    meter = CpuMeter(load.server)
    begin, end = math.inf, math.inf

    def on_begin(moment: float) -> None:
        nonlocal begin, end
        begin, end = moment, math.inf if load.requests else moment + load.duration_s
        view.begin(load, moment)

    schedule(load.comes_first)  # this process too: it looks at the server's processes at the right moments
    try:
        outcome = pool.run(load, n_processes, on_begin, view.tick, lambda: meter.look(begin, end))
        server = meter.finish()
    finally:
        schedule(realtime=False)
    return {
        "load": load.as_dict(),
        **summarize(load, outcome.records, limits),
        "client": {
            "processes": len(outcome.cores),
            "cores": round(sum(outcome.cores), 3),
            "busiest_process": max(outcome.cores),
            "scheduling": outcome.scheduling,
            "longest_waiting": max(outcome.waited),
            "too_busy": max(outcome.cores) > BUSY and load.protocol != "engine",  # there it is the engine that is busy
        },
        "server": server,
    }

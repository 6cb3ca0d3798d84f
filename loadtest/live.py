"""Show a run on standard error while it goes on: a progress bar, the rate, percentiles and errors so far."""

from __future__ import annotations

import time
from collections import Counter, deque

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.generator.worker_process import Tick
from loadtest.load import Load
from tinylm.terminal.output import PlainConsole

RECENT_CALLS = 2000  # that the percentiles show


class LiveView(Progress):
    """The view of a sweep, shown within its `with` block if standard error is a terminal and `quiet` is not set."""

    def __init__(self, n_runs: int, quiet: bool) -> None:
        console = PlainConsole(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._sweep = self.add_task("all runs", total=n_runs, visible=n_runs > 1)
        self._run = self.add_task("")

    def begin(self, load: Load, begin: float) -> None:
        """Show a run whose measured time begins at `begin`, in seconds of `time.monotonic()`."""
        self._load, self._begin = load, begin
        self._latencies: deque[float] = deque(maxlen=RECENT_CALLS)
        self._statuses: Counter[str] = Counter()
        self.reset(self._run, total=load.requests or load.warmup_s + load.duration_s, description=load.name)

    def end(self) -> None:
        self.advance(self._sweep)

    def tick(self, tick: Tick) -> None:
        """Add what a process reports, that of the warm-up included."""
        if self.disable:
            return
        self._latencies.extend(tick.latencies_s)
        self._statuses.update(tick.statuses)
        elapsed_s = time.monotonic() - self._begin + self._load.warmup_s
        p50, p99 = np.percentile(self._latencies, [50, 99]) * 1000 if self._latencies else (0.0, 0.0)
        n_ended = self._statuses.total()
        failed = "".join(f", {count:,} {status}" for status, count in self._statuses.items() if status != "OK")
        self.update(
            self._run,
            completed=n_ended if self._load.requests else elapsed_s,
            description=f"{self._load.name}: {n_ended / elapsed_s:,.1f} requests/s, "
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms{failed}",
        )

"""Show a run on standard error while it is going on: a progress bar, rates, percentiles so far."""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from loadtest.generator.worker_process import Tick
from loadtest.load import Load
from tinylm.terminal.output import PlainConsole

RECENT_S = 3.0
RECENT_CALLS = 2000


class LiveView:
    """The view of a sweep, shown within its `with` block if standard error is a terminal and `quiet` is not set."""

    def __init__(self, n_runs: int, quiet: bool) -> None:
        console = PlainConsole(stderr=True)
        self._shown = console.is_terminal and not quiet
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._sweep = self._progress.add_task("all runs", total=n_runs, visible=n_runs > 1)
        self._task = self._progress.add_task("", total=1)
        self._begin = 0.0
        self._load: Load | None = None
        self._answers: deque[tuple[float, int, int]] = deque()  # (when, calls, tokens) of each tick
        self._latencies: deque[float] = deque(maxlen=RECENT_CALLS)
        self._statuses: Counter[str] = Counter()
        self._in_flight = 0
        self._live = Live(console=console, transient=True, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> LiveView:
        if self._shown:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._live.stop()

    def begin(self, load: Load, begin: float) -> None:
        """Start to show a run whose measured time begins at `begin`, in seconds of `time.monotonic()`."""
        self._load, self._begin = load, begin
        self._answers.clear()
        self._latencies.clear()
        self._statuses.clear()

    def end(self) -> None:
        self._load = None
        self._progress.advance(self._sweep)

    def tick(self, tick: Tick) -> None:
        now = time.monotonic()
        self._answers.append((now, len(tick.statuses), tick.tokens))
        while self._answers and self._answers[0][0] < now - RECENT_S:
            self._answers.popleft()
        self._latencies.extend(tick.latencies_s)
        self._statuses.update(tick.statuses)
        self._in_flight = tick.in_flight

    def _render(self) -> Group:
        load = self._load
        if load is None:
            return Group(self._progress)
        elapsed = time.monotonic() - self._begin
        phase = "warm-up" if elapsed < 0 else "measuring"
        done = sum(self._statuses.values())
        completed = done if load.requests else elapsed + load.warmup_s
        total = load.requests or load.duration_s + load.warmup_s
        self._progress.update(self._task, completed=completed, total=total, description=f"{load.name}, {phase}")
        rate, tokens = (sum(tick[i] for tick in self._answers) / RECENT_S for i in (1, 2))
        p50, p99 = np.percentile(self._latencies, [50, 99]) * 1000 if self._latencies else (0.0, 0.0)
        failed = {status: count for status, count in self._statuses.items() if status != "OK"}
        line = (
            f"{done:,} answers   {rate:,.1f} requests/s   {tokens:,.0f} tokens/s   "
            f"p50 {p50:.1f} ms   p99 {p99:.1f} ms   {self._in_flight} open"
        )
        errors = Text("   ".join(f"{status} {count:,}" for status, count in failed.items()), style="red")
        return Group(self._progress, Text(line), errors)

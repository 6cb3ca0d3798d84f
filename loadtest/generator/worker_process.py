"""A process that makes calls. It takes jobs from a pipe, reports progress, and returns the records of its calls.

The messages are: Job -> Ready (connected) -> the begin of the measured time -> Tick, Tick, ... -> Done or Failed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from loadtest.generator.call_record import CallRecord
from loadtest.generator.caller import connect
from loadtest.generator.loops import Loops
from loadtest.generator.priority import Scheduling, schedule, waited_s
from loadtest.generator.workload import arrivals
from loadtest.load import Load

TICK_S = 0.25


@dataclass(frozen=True)
class Job:
    """The share of a run that one process makes: the requests index, index + n_jobs, index + 2 * n_jobs, ..."""

    load: Load  # of the whole run
    index: int
    n_jobs: int

    def share(self, total: int) -> int:
        """Return the share of a number that this process gets. The first processes get one more if there is a rest."""
        return total // self.n_jobs + (self.index < total % self.n_jobs)

    def times_s(self) -> np.ndarray:
        """Return when to send the requests of an open loop, in seconds from the start of the measured time."""
        return arrivals(self.load)[self.index :: self.n_jobs]


@dataclass(frozen=True)
class Ready:
    """The process is connected. It waits until the measurement begins, at a time in seconds of `time.monotonic()`."""


@dataclass(frozen=True)
class Tick:
    """Progress since the last tick."""

    latencies_s: list[float]  # of calls with status OK
    statuses: list[str]


@dataclass(frozen=True)
class Done:
    """The records of all calls, those of the warm-up included, and the CPU time that the process had."""

    records: list[CallRecord]
    cpu_cores: float
    waited: float  # share of the time in which its event loop was ready to run and had no core
    scheduling: Scheduling


@dataclass(frozen=True)
class Failed:
    error: str


def main(pipe: Connection) -> None:
    """Work on jobs until the pipe closes. Run this in a new process, started by `spawn`: gRPC cannot fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with asyncio.Runner() as runner:  # gRPC needs one event loop for all jobs
        while True:
            try:
                job: Job = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(runner.run(_run(job, pipe)))
            except (EOFError, BrokenPipeError):
                return
            except Exception as error:
                pipe.send(Failed(f"{type(error).__name__}: {error}"))


async def _run(job: Job, pipe: Connection) -> Done:
    load = dataclasses.replace(
        job.load,
        connections=max(job.share(job.load.n_connections), 1),
        max_in_flight=max(job.share(job.load.max_in_flight), 1),
    )
    times_s = None if load.rate_per_s is None else job.times_s()
    scheduling = schedule(load.comes_first)  # before connections start threads
    caller = await connect(load)
    loops = Loops(load, caller, job.index, job.n_jobs)
    gc.collect()
    gc.freeze()  # so that collections during the measurement do not look at what exists already
    pipe.send(Ready())
    begin: float = await asyncio.to_thread(pipe.recv)
    clocks = _Clocks(begin, None if load.requests else begin + load.duration_s)
    progress = asyncio.create_task(_report_progress(pipe, loops.ended))
    try:
        if times_s is not None:
            await loops.open(begin + times_s)
        else:
            requests = None if load.requests is None else job.share(load.requests)
            await loops.closed(job.share(load.concurrency or 0), begin, requests)
        cpu_cores, waited = clocks.used()
    finally:
        progress.cancel()
        await caller.close()
    return Done([record.since(begin) for record in loops.ended], cpu_cores, waited, scheduling)


class _Clocks:
    """The CPU time of this process within the measured time, without the wait for the last answers."""

    def __init__(self, begin: float, end: float | None) -> None:
        """end: None if the measured time ends with the last answer."""
        self._seen: list[tuple[float, float, float]] = []
        loop = asyncio.get_running_loop()  # its clock is `time.monotonic()`
        loop.call_at(begin, self._look)
        if end is not None:
            loop.call_at(end, self._look)

    def used(self) -> tuple[float, float]:
        """Return the cores that this process used, and the share of the time in which it waited for one."""
        if len(self._seen) < 2:
            self._look()
        (begin, cpu_before, waited_before), (end, cpu_after, waited_after) = self._seen[0], self._seen[-1]
        elapsed = max(end - begin, 1e-9)
        return (cpu_after - cpu_before) / elapsed, (waited_after - waited_before) / elapsed

    def _look(self) -> None:
        self._seen.append((time.monotonic(), time.process_time(), waited_s()))


async def _report_progress(pipe: Connection, ended: list[CallRecord]) -> None:
    seen = 0
    while True:
        await asyncio.sleep(TICK_S)
        new = ended[seen:]
        seen += len(new)
        latencies_s = [record.latency_s for record in new if record.status == "OK"]
        pipe.send(Tick(latencies_s, [record.status for record in new]))

"""A process that makes calls: takes jobs from a pipe, tells now and then how far it is, hands back what it saw.

Parent and worker speak so: Job -> Ready (connected) -> begin, a float -> Tick, Tick, ... -> Done, or Failed.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from loadtest.client.caller import connect
from loadtest.client.loops import Asking, Ledger
from loadtest.client.scheduling import Scheduling, schedule, waited_s
from loadtest.load import Load
from loadtest.records import Records
from loadtest.workload import Workload

TICK_S = 0.25


@dataclass(frozen=True)
class Job:
    """One process' share of a run."""

    load: Load  # its connections are this process' own
    first_turn: int  # its requests are first_turn, first_turn + turn_step, ...
    turn_step: int
    n_clients: int  # closed loop
    requests: int | None  # closed loop: this process' share of load.requests
    times_s: np.ndarray | None  # open loop: when each request is to be sent, from the start of the measured time


@dataclass(frozen=True)
class Ready:
    """Connected: waits to be told when the measured time begins, in `time.monotonic()` seconds."""


@dataclass(frozen=True)
class Tick:
    """Progress since the last tick."""

    latencies_s: list[float]  # of calls with status OK
    statuses: list[str]
    tokens: int
    in_flight: int


@dataclass(frozen=True)
class Done:
    """All that was seen, warm-up included, and what this process had of the CPU while it was measured."""

    records: Records
    cpu_cores: float
    waited: float  # share of the time that its event loop was ready to run and another had the core
    scheduling: Scheduling


@dataclass(frozen=True)
class Failed:
    error: str


def main(pipe: Connection) -> None:
    """Work off jobs until the pipe closes. For a process of its own (`spawn`: gRPC can't be forked)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with asyncio.Runner() as runner:  # one event loop for all jobs, as gRPC wants it
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
    workload, ledger = Workload(job.load), Ledger()
    scheduling = schedule(job.load.comes_first)  # before threads of connections
    caller = await connect(job.load)
    gc.collect()
    gc.freeze()  # what has been imported and planned is not looked through again while calls are timed
    pipe.send(Ready())
    begin: float = await asyncio.to_thread(pipe.recv)
    ticking = asyncio.create_task(_tick(pipe, ledger))
    measuring = asyncio.create_task(_used_at(begin))
    lasting = job.load.duration_s if job.load.requests is None else None
    measured = None if lasting is None else asyncio.create_task(_used_at(begin + lasting))
    asking = Asking(job.load, caller, workload, ledger)
    try:
        if job.times_s is not None:
            await asking.open_loop(job.first_turn, job.turn_step, begin + job.times_s)
        else:
            await asking.closed_loop(job.first_turn, job.turn_step, job.n_clients, begin, job.requests)
        elapsed = max(time.monotonic() - begin, 1e-9)
        cpu_s, waited = time.process_time(), waited_s()
        if measured is not None and lasting is not None:  # without the wait for the last answers
            elapsed, (cpu_s, waited) = lasting, await measured
        cpu_s_before, waited_before = await measuring
    finally:
        for task in (ticking, measuring, measured):
            if task is not None:
                task.cancel()
        await caller.close()
    used = (cpu_s - cpu_s_before) / elapsed, (waited - waited_before) / elapsed
    return Done(Records.of(ledger.ended, begin), *used, scheduling)


async def _used_at(moment: float) -> tuple[float, float]:
    """Seconds of CPU that this process has used until then, and that it has waited for one."""
    await asyncio.sleep(max(moment - time.monotonic(), 0))
    return time.process_time(), waited_s()


async def _tick(pipe: Connection, ledger: Ledger) -> None:
    seen = 0
    while True:
        await asyncio.sleep(TICK_S)
        new = ledger.ended[seen:]
        seen += len(new)
        ok = [call for call in new if call.status == "OK"]
        latencies = [call.ended_at - call.intended_at for call in ok]
        pipe.send(Tick(latencies, [call.status for call in new], sum(call.tokens for call in ok), ledger.in_flight))

"""The processes that make calls, and one run shared out among them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import numpy as np

from loadtest.client import worker
from loadtest.client.scheduling import Scheduling
from loadtest.client.worker import Done, Failed, Job, Ready, Tick
from loadtest.load import Load
from loadtest.records import Records
from loadtest.workload import arrivals

START_S = 0.05  # between the word to start and the first call
READY_S = 120.0  # an engine in the process may have to compile its kernels first


@dataclass(frozen=True)
class Outcome:
    """What all processes saw, and what each had of the cores."""

    records: Records
    cores: list[float]
    waited: list[float]  # shares of the time that they waited for one
    scheduling: Scheduling


class Pool:
    """Processes kept over the runs of a sweep; use it in a `with`, which ends them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
        for process, _ in self._workers:
            process.join(5)

    def run(
        self,
        load: Load,
        n_processes: int,
        on_begin: Callable[[float], None] = lambda begin: None,
        on_tick: Callable[[Tick], None] = lambda tick: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Carry out a run. Raises RuntimeError when a process fails, which no failed call makes it do.

        on_begin: told when the measured time begins (`time.monotonic()`), before it does; on_wait: called often.
        """
        jobs = share_out(load, n_processes)
        while len(self._workers) < len(jobs):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=worker.main, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        pipes = [pipe for _, pipe in self._workers[: len(jobs)]]
        for pipe, job in zip(pipes, jobs, strict=True):
            pipe.send(job)
        deadline = time.monotonic() + READY_S
        for pipe in pipes:
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                raise RuntimeError(f"a process of the load generator was not ready within {READY_S:.0f} s")
            if not isinstance(message := _receive(pipe), Ready):
                raise RuntimeError(f"a process of the load generator sent {message!r} instead of being ready")
        begin = time.monotonic() + START_S + load.warmup_s
        for pipe in pipes:
            pipe.send(begin)
        on_begin(begin)
        done: dict[Connection, Done] = {}
        while len(done) < len(pipes):
            ready = wait([pipe for pipe in pipes if pipe not in done], timeout=0.1)
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                message = _receive(pipe)
                if isinstance(message, Done):
                    done[pipe] = message
                elif isinstance(message, Tick):
                    on_tick(message)
            on_wait()
        results = [done[pipe] for pipe in pipes]
        return Outcome(
            Records.merged([r.records for r in results]),
            [round(r.cpu_cores, 3) for r in results],
            [round(r.waited, 3) for r in results],
            results[0].scheduling,
        )


def _receive(pipe: Connection) -> Ready | Tick | Done:
    try:
        message = pipe.recv()
    except EOFError:
        raise RuntimeError("a process of the load generator ended unexpectedly") from None
    if isinstance(message, Failed):
        raise RuntimeError(message.error)
    return message


def share_out(load: Load, n_processes: int) -> list[Job]:
    """A job a process: clients, connections, requests and arrivals, divided as evenly as they can be.

    No more processes than clients: what is left over of an uneven division goes to the first ones.
    """
    n = min(n_processes, load.concurrency or n_processes, load.requests or n_processes)
    times = arrivals(load) if load.rate_per_s is not None else None
    clients, connections = _divided(load.concurrency or 0, n), _divided(load.n_connections, n)
    requests = [None] * n if load.requests is None else _divided(load.requests, n)
    in_flight = _divided(load.max_in_flight, n)
    return [
        Job(
            dataclasses.replace(load, connections=max(connections[i], 1), max_in_flight=max(in_flight[i], 1)),
            first_turn=i,
            turn_step=n,
            n_clients=clients[i],
            requests=requests[i],
            times_s=None if times is None else times[i::n],
        )
        for i in range(n)
    ]


def _divided(total: int, n: int) -> list[int]:
    return np.diff(np.arange(n + 1) * total // n)[::-1].tolist()

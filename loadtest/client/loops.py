"""The two loops: clients that wait for their answers, and a schedule that waits for nothing."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from loadtest.client.caller import Caller
from loadtest.load import Load
from loadtest.records import Call
from loadtest.workload import Workload

ERROR_PAUSE_S = 0.05  # of a client whose call failed, so that a service that refuses is not asked in a busy loop


@dataclass
class Ledger:
    """The calls of a run so far."""

    ended: list[Call] = field(default_factory=list)
    in_flight: int = 0


class Asking:
    """One process' part of a run: its workload, its caller, its ledger."""

    def __init__(self, load: Load, caller: Caller, workload: Workload, ledger: Ledger) -> None:
        self._load, self._caller, self._workload, self._ledger = load, caller, workload, ledger

    async def once(self, turn: int, intended_at: float, sent_at: float, connection: int) -> Call:
        """One call; `intended_at`: when it should have been made, `sent_at`: now."""
        ask = self._workload[turn]
        self._ledger.in_flight += 1
        call = Call(turn, ask.max_tokens, intended_at, sent_at)
        try:
            await self._caller.ask(ask, call, connection)
        finally:
            self._ledger.in_flight -= 1
        call.ended_at = time.monotonic()
        self._ledger.ended.append(call)
        return call

    async def closed_loop(self, first: int, step: int, n_clients: int, begin: float, requests: int | None) -> None:
        """`n_clients` that ask until `begin` + duration, or until `requests` calls have been sent after `begin`.

        first, step: this process' turns are first, first + step, first + 2 * step, ...
        """
        end = begin + self._load.duration_s if requests is None else math.inf
        left = math.inf if requests is None else requests
        turn = first - step

        async def client(number: int) -> None:
            nonlocal left, turn
            while True:
                now = time.monotonic()
                if now >= end or (now >= begin and left == 0):
                    return
                if now >= begin:
                    left -= 1
                turn += step
                call = await self.once(turn, now, now, number)
                if call.status != "OK":
                    await asyncio.sleep(ERROR_PAUSE_S)

        await asyncio.gather(*(client(number) for number in range(n_clients)))

    async def open_loop(self, first: int, step: int, times: np.ndarray) -> None:
        """Send the request of each turn at its time (`time.monotonic()`), and wait for the last answer.

        A thread keeps the times, since the event loop's own timers are a millisecond coarse. A request that is late
        all the same, because this process had too much to do or `max_in_flight` calls are open, is sent at once; its
        latency counts from when it was intended. Raises what a caller raises, as the closed loop does.
        """
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(self._load.max_in_flight)
        sent = asyncio.Event()
        tasks: set[asyncio.Task] = set()
        failures: list[BaseException] = []  # of the load test itself: a call that fails is a call with its status

        async def send(turn: int, at: float) -> None:
            async with room:
                await self.once(turn, at, time.monotonic(), turn)

        def start(turn: int, at: float) -> None:
            task = asyncio.create_task(send(turn, at))
            tasks.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                failures.append(error)

        def keep_time() -> None:
            for number, at in enumerate(times.tolist()):
                if (pause := at - time.monotonic()) > 0:
                    time.sleep(pause)
                loop.call_soon_threadsafe(start, first + number * step, at)
            loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=keep_time, name="timekeeper", daemon=True).start()
        await sent.wait()
        while tasks and not failures:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        if failures:
            raise failures[0]

"""The closed loop, in which clients wait for their answers, and the open loop, which sends by a schedule."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

import numpy as np

from loadtest.generator.call_record import CallRecord
from loadtest.generator.caller import Caller
from loadtest.generator.workload import Workload
from loadtest.load import Load

ERROR_PAUSE_S = 0.05  # after a failed call of a client, so that a refusing service does not cause a busy loop


class Loops:
    """The share of a run that one process makes.

    Its requests have the turns first, first + step, first + 2 * step, ...
    """

    def __init__(self, load: Load, caller: Caller, first: int, step: int) -> None:
        self.ended: list[CallRecord] = []
        self._load, self._caller = load, caller
        self._first, self._step = first, step
        self._workload = Workload(load)

    async def closed(self, n_clients: int, begin: float, requests: int | None) -> None:
        """Warm up, and run clients until `begin` + duration, or until they have sent `requests` calls after `begin`."""
        end = begin + self._load.duration_s if requests is None else math.inf
        left = math.inf if requests is None else requests
        turn = self._first - self._step

        async def client(number: int) -> None:
            nonlocal left, turn
            while True:
                now = time.monotonic()
                if now >= end or (now >= begin and left == 0):
                    return
                if now >= begin:
                    left -= 1
                turn += self._step
                record = await self._call(turn, now, now, number)
                if record.status != "OK":
                    await asyncio.sleep(ERROR_PAUSE_S)

        while (pause := begin - self._load.warmup_s - time.monotonic()) > 0:
            await asyncio.sleep(pause)
        await asyncio.gather(*(client(number) for number in range(n_clients)))

    async def open(self, times: np.ndarray) -> None:
        """Send each request at its time, in seconds of `time.monotonic()`, and wait for the last answer.

        A request is late if this process is too busy or if `max_in_flight` calls are open. Its latency counts from the
        intended time. Raises the error of a caller, like the closed loop.
        """
        room = asyncio.Semaphore(self._load.max_in_flight)
        errors: list[Exception] = []  # of the load test itself: a failed call has a status instead
        in_flight: set[asyncio.Task[None]] = set()

        async def send(turn: int, at: float) -> None:
            try:
                async with room:
                    await self._call(turn, at, time.monotonic(), turn)
            except Exception as error:
                errors.append(error)
                for call in in_flight:
                    call.cancel()

        async with asyncio.TaskGroup() as calls:

            def start(number: int, at: float) -> None:
                if not errors:
                    call = calls.create_task(send(self._first + number * self._step, at))
                    in_flight.add(call)
                    call.add_done_callback(in_flight.discard)

            await _at_times(times, start)
        if errors:
            raise errors[0]

    async def _call(self, turn: int, intended_at: float, sent_at: float, connection: int) -> CallRecord:
        """Make the call of that turn now, at `sent_at`."""
        request = self._workload[turn]
        record = CallRecord(turn, request.max_tokens, intended_at, sent_at)
        await self._caller.ask(request, record, connection)
        record.ended_at = time.monotonic()
        self.ended.append(record)
        return record


async def _at_times(times: np.ndarray, start: Callable[[int, float], None]) -> None:
    """Call `start(number, time)` in the event loop at each time.

    A thread keeps the times, because the timers of the event loop are only accurate to a millisecond.
    """
    loop = asyncio.get_running_loop()
    all_started = asyncio.Event()

    def keep_time() -> None:
        for number, at in enumerate(times.tolist()):
            if (pause := at - time.monotonic()) > 0:
                time.sleep(pause)
            loop.call_soon_threadsafe(start, number, at)
        loop.call_soon_threadsafe(all_started.set)

    threading.Thread(target=keep_time, name="timekeeper", daemon=True).start()
    await all_started.wait()

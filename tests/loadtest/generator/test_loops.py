"""The closed loop and the open loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from loadtest.generator.call_record import CallRecord
from loadtest.generator.loops import Loops
from loadtest.generator.workload import Request
from loadtest.load import Load, Mix


class BrokenCaller:
    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        if record.turn % 2:
            raise RuntimeError("the caller is broken")

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "run",
    [
        lambda loops: loops.open(time.monotonic() + np.arange(10) / 100),
        lambda loops: loops.closed(2, time.monotonic(), None),
    ],
    ids=["open", "closed"],
)
def test_an_error_of_a_caller_ends_the_run(run: Callable[[Loops], Awaitable[None]]) -> None:
    """No status of a call would report it."""
    loops = Loops(Load("localhost:1", Mix.parse("4", "n"), 1, duration_s=1), BrokenCaller(), 0, 1)

    async def main() -> None:
        await run(loops)

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(main())


class InstantCaller:
    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        record.status = "OK"
        await asyncio.sleep(0)


def test_a_closed_loop_without_warm_up_sends_exactly_its_requests() -> None:
    """Also if there is time before it begins."""
    loops = Loops(Load("localhost:1", Mix.parse("4", "n"), 2, requests=6, warmup_s=0), InstantCaller(), 0, 1)
    begin = time.monotonic() + 0.05
    asyncio.run(loops.closed(2, begin, 6))
    assert sorted(record.turn for record in loops.ended) == [0, 1, 2, 3, 4, 5]
    assert min(record.sent_at for record in loops.ended) >= begin

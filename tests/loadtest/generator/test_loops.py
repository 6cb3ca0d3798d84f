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

"""Merged generators lose no item, and end together."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tinylm.serving.http.merge import merged


def test_merged_generators_lose_nothing_and_an_error_ends_all() -> None:
    closed = []

    async def count(name: int, items: int, error: bool = False) -> AsyncGenerator[tuple[int, int], None]:
        try:
            for item in range(items):
                await asyncio.sleep(0)
                yield name, item
            if error:
                raise ValueError("the middle one")
        finally:
            closed.append(name)

    async def collect(*generators: AsyncGenerator[tuple[int, int], None]) -> list:
        return [(number, item) async for number, item in merged(generators, most=3)]

    got = asyncio.run(collect(count(0, 5), count(1, 0), count(2, 3)))
    for name, items in ((0, 5), (1, 0), (2, 3)):
        assert [item for number, item in got if number == name] == [(name, item) for item in range(items)]
    closed.clear()
    with pytest.raises(ValueError, match="the middle one"):
        asyncio.run(collect(count(0, 10**9), count(1, 2, error=True), count(2, 10**9)))
    assert sorted(closed) == [0, 1, 2]


def test_only_so_many_generators_run_at_once_in_their_order() -> None:
    running: list[int] = []
    began: list[int] = []

    async def answer(name: int) -> AsyncGenerator[int, None]:
        began.append(name)
        running.append(name)
        assert len(running) <= 2
        for item in range(1 + name % 3):
            await asyncio.sleep(0)
            yield item
        running.remove(name)

    async def collect() -> list:
        return [item async for item in merged([answer(name) for name in range(7)], most=2)]

    assert len(asyncio.run(collect())) == sum(1 + name % 3 for name in range(7))
    assert began == sorted(began)


def test_generators_wait_for_a_consumer_that_stops() -> None:
    """Otherwise a client that does not read would have all its answers generated and kept in memory."""
    items: list[int] = []

    async def count(name: int) -> AsyncGenerator[int, None]:
        for item in range(100):
            items.append(name)
            yield item

    async def collect() -> list:
        together = merged([count(name) for name in range(5)], most=2)
        first = await anext(together)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert set(items) == {0, 1}
        assert len(items) <= 1 + 2 * 2  # one is consumed, two wait in the queue, and one in each generator
        return [first] + [item async for item in together]

    assert len(asyncio.run(collect())) == len(items) == 500

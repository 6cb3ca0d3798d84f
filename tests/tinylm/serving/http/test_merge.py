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

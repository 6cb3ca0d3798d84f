"""Merge several asynchronous generators into one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


async def merged(generators: Sequence[AsyncGenerator[T, None]], most: int) -> AsyncGenerator[tuple[int, T], None]:
    """Yield each item when it is ready, with the number of its generator.

    At most `most` generators run at once; the others wait, in their order. If the consumer stops, each of these stops
    after its next items, and no other begins. The first error ends all generators. Closing this generator also ends
    them.
    """
    if len(generators) == 1:  # the usual case needs no tasks, and is faster without
        async with aclosing(generators[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(most)  # bounded, for a consumer that stops
    places = asyncio.Semaphore(most)  # its waiters get places in their order

    async def pump(number: int, generator: AsyncGenerator[T, None]) -> None:
        try:
            async with places, aclosing(generator):
                async for item in generator:
                    await queue.put((number, item))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, _END))

    tasks = [asyncio.create_task(pump(number, generator)) for number, generator in enumerate(generators)]
    try:
        n_left = len(tasks)
        while n_left:
            number, item = await queue.get()
            if item is _END:
                n_left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

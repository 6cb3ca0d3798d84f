"""Several asynchronous generators as one, whose items come as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


async def merged(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items with the place of their generator. The first error ends all of them, and so does closing this one."""
    if len(generators) == 1:  # no task of its own: the usual case is the fast one
        async with aclosing(generators[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(place: int, generator: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(generator):
                async for item in generator:
                    queue.put_nowait((place, item))
        except Exception as error:
            queue.put_nowait((place, error))
        else:
            queue.put_nowait((place, _END))

    tasks = [asyncio.create_task(pump(place, generator)) for place, generator in enumerate(generators)]
    try:
        n_left = len(tasks)
        while n_left:
            place, item = await queue.get()
            if item is _END:
                n_left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

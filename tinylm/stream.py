"""An answer on its way: iterate for its pieces of text; afterwards it has its completion. Plain and asynchronous.

Where the pieces come from, an engine in this process or a service, is the business of who makes the stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Generic, Self, TypeVar

from tinylm.sampling import TokenLogprobs

C = TypeVar("C")
Update = tuple[str, list[TokenLogprobs], C | None]  # more text, its tokens' log-probabilities; with the last the whole


class _Answer(Generic[C]):
    """What both kinds of stream know of their answer so far."""

    def __init__(self) -> None:
        self.logprobs: list[TokenLogprobs] = []  # of the tokens of the pieces so far, if they were asked for
        self._completion: C | None = None

    @property
    def completion(self) -> C:
        """The whole answer; RuntimeError while its pieces have not come to their end."""
        if self._completion is None:
            raise RuntimeError("the stream has not come to its end: there is no completion yet")
        return self._completion

    def _take(self, update: Update[C]) -> str:
        text, logprobs, self._completion = update
        self.logprobs += logprobs
        return text


class Stream(_Answer[C]):
    """Pieces of text, none of them empty. `close`, or leaving its `with`, ends the answer where it is."""

    def __init__(self, updates: Generator[Update[C], None, None]) -> None:
        super().__init__()
        self._updates = updates

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        for update in self._updates:
            if text := self._take(update):
                return text
        raise StopIteration

    def close(self) -> None:
        self._updates.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncStream(_Answer[C]):
    """The same for `async for`, `aclose` and `async with`."""

    def __init__(self, updates: AsyncGenerator[Update[C], None]) -> None:
        super().__init__()
        self._updates = updates

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        async for update in self._updates:
            if text := self._take(update):
                return text
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._updates.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

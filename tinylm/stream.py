"""An answer that is still being generated: iterate over its pieces of text, then read its completion.

`Stream` is for plain code, `AsyncStream` for asyncio. The pieces come from a generator: an engine's or a service's.
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
    """Pieces of text, none of them empty. `close`, or the end of its `with`, cancels the rest of the answer.

    Only one thread at a time may use a stream. An exception in `next`, such as Ctrl-C, ends the stream.
    """

    def __init__(self, updates: Generator[Update[C], None, None]) -> None:
        super().__init__()
        self._updates = updates

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            for update in self._updates:
                if text := self._take(update):
                    return text
        except BaseException:  # it may have interrupted the stream between two updates: continuing would lose a piece
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        try:
            self._updates.close()
        finally:
            self._updates.close()  # again: a second Ctrl-C can interrupt the first

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

"""An answer in progress: iterate over its pieces of text, then read its completion.

`Stream` is for plain code, `AsyncStream` for asyncio. Their updates come from a generator of `LLM` or of a client.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Generic, Self, TypeVar

from tinylm.sampling import TokenLogprobs

C = TypeVar("C")
# New text, the log-probabilities of its tokens, and at the end the completion.
Update = tuple[str, list[TokenLogprobs], C | None]


class _StreamedAnswer(Generic[C]):
    """The part of an answer that has arrived."""

    def __init__(self) -> None:
        self.logprobs: list[TokenLogprobs] = []  # one per token so far, if the request asks for them
        self._completion: C | None = None

    @property
    def completion(self) -> C:
        """Return the complete answer. Raise RuntimeError before the stream has ended."""
        if self._completion is None:
            raise RuntimeError("the stream has not ended: read all its pieces before its completion")
        return self._completion

    def _take(self, update: Update[C]) -> str:
        text, logprobs, self._completion = update
        self.logprobs += logprobs
        return text


class Stream(_StreamedAnswer[C]):
    """An iterator of pieces of text that are not empty. `close`, or the end of a `with`, cancels the rest.

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
        except BaseException:  # the exception may have lost an update, so the stream cannot continue
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


class AsyncStream(_StreamedAnswer[C]):
    """An asynchronous iterator like `Stream`, with `aclose` and `async with`."""

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

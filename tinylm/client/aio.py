"""The client for asyncio. It shares `connection`, `attempts` and `answer` with the client for threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from tinylm.client.answer import ReceivedAnswer, ServedCompletion, completion_of, tokens
from tinylm.client.attempts import CUT_OFF, Attempts
from tinylm.client.connection import Connection
from tinylm.client.wire import check_text, explain_request, request_from_params
from tinylm.sampling import SamplingParams
from tinylm.stream import AsyncStream, Update
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

R = TypeVar("R")


class AsyncClient(Connection):
    """`tinylm.Client` for asyncio: the same settings, methods and errors. Close it, or use it in an `async with`.

    The client belongs to the event loop of its first call. Cancel a task to cancel its call in the service.
    """

    _closed: asyncio.Event

    def _prepare(self) -> None:
        self._closed = asyncio.Event()

    @cached_property
    def _channel(self) -> Any:  # created in the first call, because it is bound to the event loop that runs then
        return self._open(grpc.aio)

    @cached_property
    def _stub(self) -> TinyLMStub:
        return TinyLMStub(self._channel)

    async def generate(self, prompt: str, params: SamplingParams | None = None) -> ServedCompletion:
        """Return the whole answer. Raise ValueError for a bad request, ServiceError for every other failure."""
        params = params or SamplingParams()
        response, attempt = await self._ask("Generate", request_from_params(prompt, params))
        return completion_of(params, response, attempt)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> AsyncStream[ServedCompletion]:
        """Return the answer as a stream of pieces, for `async for`. Its `completion` is set after the last piece.

        The call begins when the first piece is requested. Closing the stream cancels the call. The stream raises the
        same errors as `generate`. A call that breaks after its first piece is not retried.
        """
        params = params or SamplingParams()
        return AsyncStream(self._updates(request_from_params(prompt, params), params))

    async def tokenize(self, text: str) -> list[tuple[int, bytes]]:
        """Return the token ids of a text, each with its bytes."""
        check_text("text", text)
        return tokens((await self._ask("Tokenize", pb.TokenizeRequest(text=text)))[0])

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD."""
        return (await self._ask("Detokenize", pb.DetokenizeRequest(tokens=tokens)))[0].text

    async def explain(
        self, prompt: str, piece: str, params: SamplingParams | None = None, **fields: int | str
    ) -> pb.ExplainResponse:
        """Return a piece of an explanation of a prompt of at most 64 tokens, in the field of that name.

        piece: tokens, norms, attention, lens, scores, matmul, cache or batch. params: the settings, only for scores;
        None means `SamplingParams()`. fields: those of the piece in `ExplainRequest`, such as `layer`.
        Raise the same errors as `generate`. The client retries after the time that a busy replica names.
        """
        return (await self._ask("Explain", explain_request(prompt, piece, params, fields)))[0]

    async def info(self) -> pb.GetModelInfoResponse:
        """Return the service's description of its model, and the name of the replica that answered."""
        return (await self._ask("GetModelInfo", pb.GetModelInfoRequest()))[0]

    async def close(self) -> None:
        """Close the connection. Running calls end with ServiceError, and so do later calls."""
        self._closed.set()
        if "_channel" in self.__dict__:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _ask(self, name: str, request: object) -> tuple[Any, int]:
        """Return the response of a unary call, and how many attempts it took."""
        attempts = self._attempts()
        while True:
            self._require_open(attempts)
            try:
                call = getattr(self._stub, name)(request, metadata=self._metadata, timeout=attempts.begin())
                return await self._unless_closed(call, attempts), attempts.n
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.pause_after(error)
            await self._pause(pause_s)

    async def _updates(
        self, request: pb.GenerateRequest, params: SamplingParams
    ) -> AsyncGenerator[Update[ServedCompletion], None]:
        attempts = self._attempts()
        while True:
            self._require_open(attempts)
            call = self._stub.GenerateStream(request, metadata=self._metadata, timeout=attempts.begin())
            answer = ReceivedAnswer(params, attempts.n)
            try:
                while (message := await self._unless_closed(call.read(), attempts)) is not grpc.aio.EOF:
                    update = answer.add(message)
                    yield update
                    if update[-1] is not None:
                        return
                pause_s = attempts.pause_s(*CUT_OFF, answer.has_begun)
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.pause_after(error, answer.has_begun)
            finally:
                call.cancel()
            await self._pause(pause_s)

    async def _unless_closed(self, result: Awaitable[R], attempts: Attempts) -> R:
        """Return an awaited result. Raise ServiceError if this client is closed meanwhile.

        gRPC raises CancelledError for a closed channel. The same error must pass when the caller's task is cancelled:
        the count of the task's cancellations tells the two apart.
        """
        task = asyncio.current_task()
        n_cancelled = task.cancelling() if task else 0
        try:
            return await result
        except (asyncio.CancelledError, grpc.aio.AioRpcError):
            if task is None or task.cancelling() == n_cancelled:
                self._require_open(attempts)
            raise

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt. Return at once when this client is closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()

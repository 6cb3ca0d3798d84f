"""The client for asyncio. What it shares with the plain one is in `tinylm.client.common`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import cached_property
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from tinylm.client.common import CUT_OFF, Answer, Connection, ServedCompletion, tokens, whole
from tinylm.sampling import SamplingParams
from tinylm.stream import AsyncStream, Update
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub
from tinylm.wire import request_from_params

R = TypeVar("R")


class AsyncClient(Connection):
    """`tinylm.Client` for asyncio: the same settings, methods and errors. Close it, or use it in an `async with`.

    Belongs to the event loop of its first call. A task that is cancelled cancels its call in the service.
    """

    async def generate(self, prompt: str, params: SamplingParams | None = None) -> ServedCompletion:
        """The whole answer. Raises ValueError for a bad request, ServiceError for whatever else goes wrong."""
        params = params or SamplingParams()
        response, attempt = await self._ask(self._stub.Generate, request_from_params(prompt, params))
        return whole(params, response, attempt)

    def stream(self, prompt: str, params: SamplingParams | None = None) -> AsyncStream[ServedCompletion]:
        """The answer piece by piece, for `async for`; its `completion` afterwards. Leaving it cancels the call.

        The call begins with the first piece asked for. Raises as `generate` does; once a piece has come, a stream
        that breaks is not repeated.
        """
        params = params or SamplingParams()
        return AsyncStream(self._updates(request_from_params(prompt, params), params))

    async def tokenize(self, text: str) -> list[tuple[int, bytes]]:
        """Token ids of a text, each with its own bytes."""
        return tokens((await self._ask(self._stub.Tokenize, pb.TokenizeRequest(text=text)))[0])

    async def info(self) -> pb.GetModelInfoResponse:
        """What the service says of its model, and which replica said it."""
        return (await self._ask(self._stub.GetModelInfo, pb.GetModelInfoRequest()))[0]

    async def close(self) -> None:
        """End the connection; calls under way end with ServiceError."""
        self._is_closed = True
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @cached_property
    def _channel(self) -> Any:  # made within the first call: it is bound to the event loop that runs then
        return self._open(grpc.aio)

    @cached_property
    def _stub(self) -> TinyLMStub:
        return TinyLMStub(self._channel)

    async def _ask(self, method: Callable[..., Awaitable[R]], request: object) -> tuple[R, int]:
        """A unary call's response, and how many attempts it took."""
        attempts = self._attempts()
        while True:
            self._require_open(attempts)
            try:
                return await method(request, metadata=self._metadata, timeout=attempts.begin()), attempts.n
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.pause_s(error.code(), error.details())
            await asyncio.sleep(pause_s)

    async def _updates(
        self, request: pb.GenerateRequest, params: SamplingParams
    ) -> AsyncGenerator[Update[ServedCompletion], None]:
        attempts = self._attempts()
        while True:
            self._require_open(attempts)
            call = self._stub.GenerateStream(request, metadata=self._metadata, timeout=attempts.begin())
            answer = Answer(params, attempts.n)
            try:
                async for message in call:
                    update = answer.add(message)
                    yield update
                    if update[-1] is not None:
                        return
                pause_s = attempts.pause_s(*CUT_OFF, answer.has_begun)
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.pause_s(error.code(), error.details(), answer.has_begun)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

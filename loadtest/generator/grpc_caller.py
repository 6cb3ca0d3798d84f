"""Calls to a TinyLM service over plain gRPC, without retries, interceptors and shared connections."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import grpc

from loadtest.generator.call_record import CallRecord
from loadtest.generator.workload import Request
from loadtest.load import Load
from tinylm.client import CHANNEL_OPTIONS, call_metadata
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

CONNECT_S = 5.0


class GrpcCaller:
    def __init__(self, load: Load) -> None:
        self._channels = [_channel(load) for _ in range(load.n_connections)]
        self._stubs = [TinyLMStub(channel) for channel in self._channels]
        self._metadata = call_metadata(load.api_key)
        self._load = load

    async def wait_until_connected(self) -> None:
        """Open every connection. If that takes too long, return anyway: the calls will fail."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def ask(self, request: Request, record: CallRecord, connection: int) -> None:
        stub = self._stubs[connection % len(self._stubs)]
        message = pb.GenerateRequest(
            prompt=request.prompt,
            max_tokens=request.max_tokens,
            seed=request.seed,
            ignore_eos=self._load.ignore_eos,
        )
        try:
            if self._load.stream:
                await self._stream(stub, message, record)
            else:
                answer = await stub.Generate(message, metadata=self._metadata, timeout=self._load.timeout_s)
                _read_ending(answer, record)
        except grpc.aio.AioRpcError as error:
            record.status = error.code().name

    async def _stream(self, stub: TinyLMStub, message: pb.GenerateRequest, record: CallRecord) -> None:
        finished = False
        counts: list[int] = []
        withheld = 0  # tokens without text yet: their text comes with a later message
        async for delta in stub.GenerateStream(message, metadata=self._metadata, timeout=self._load.timeout_s):
            withheld += delta.tokens
            if delta.text:
                record.text_at.append(time.monotonic())
                counts.append(withheld)
                withheld = 0
            if delta.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
                _read_ending(delta, record)
                finished = True
        if any(counts):  # otherwise the service does not count them
            record.text_tokens = counts
        if not finished:
            record.status = "CUT_OFF"  # the stream ended with status OK before the answer was finished

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def _channel(load: Load) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # do not share connections
    if load.ca is None:
        return grpc.aio.insecure_channel(load.server, options)
    return grpc.aio.secure_channel(load.server, grpc.ssl_channel_credentials(load.ca), options)


def _read_ending(message: pb.GenerateResponse | pb.GenerateStreamResponse, record: CallRecord) -> None:
    record.tokens, record.prompt_tokens = message.usage.completion_tokens, message.usage.prompt_tokens
    record.replica = message.replica

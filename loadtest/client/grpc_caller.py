"""Calls to a TinyLM service over plain gRPC: no retries, no interceptors, each connection really one of its own."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import grpc

from loadtest.load import Load
from loadtest.records import Call
from loadtest.workload import Ask
from tinylm.client import CHANNEL_OPTIONS, call_metadata
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

CONNECT_S = 5.0


class GrpcCaller:
    def __init__(self, load: Load) -> None:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # no sharing of connections
        if load.ca is None:
            self._channels = [grpc.aio.insecure_channel(load.server, options) for _ in range(load.n_connections)]
        else:
            credentials = grpc.ssl_channel_credentials(load.ca)
            self._channels = [
                grpc.aio.secure_channel(load.server, credentials, options) for _ in range(load.n_connections)
            ]
        self._stubs = [TinyLMStub(channel) for channel in self._channels]
        self._metadata = call_metadata(load.api_key)
        self._load = load

    async def wait_until_connected(self) -> None:
        """Open every connection, or give up in silence: the calls will tell."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def ask(self, ask: Ask, call: Call, connection: int) -> None:
        stub, load = self._stubs[connection % len(self._stubs)], self._load
        request = pb.GenerateRequest(prompt=ask.prompt, max_tokens=ask.max_tokens, seed=ask.seed)
        last: pb.GenerateResponse | pb.GenerateStreamResponse | None = None
        try:
            if load.stream:
                counts: list[int] = []
                waiting = 0  # tokens that came without text, and show with the next
                async for message in stub.GenerateStream(request, metadata=self._metadata, timeout=load.timeout_s):
                    last = message
                    waiting += message.tokens
                    if message.text:
                        call.text_at.append(time.monotonic())
                        counts.append(waiting)
                        waiting = 0
                if any(counts):  # else it is a service that does not tell
                    call.text_tokens = counts
                if last is None or last.finish_reason == pb.FINISH_REASON_UNSPECIFIED:
                    call.status = "CUT_OFF"  # the stream ended as OK, but before the answer did
            else:
                last = await stub.Generate(request, metadata=self._metadata, timeout=load.timeout_s)
        except grpc.aio.AioRpcError as error:
            call.status = error.code().name
        if last is not None:
            call.tokens, call.prompt_tokens = last.usage.completion_tokens, last.usage.prompt_tokens
            call.replica = last.replica

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

"""A real gRPC server that answers as a test tells it, and a connection to it that can lose all data."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server

ANSWER = ["Once", " upon", " a time"]
WAIT_S = 20


def wait_until(true: Callable[[], bool], limit_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass(frozen=True)
class Act:
    """The answer to one attempt: messages, then a status; or silence until the client leaves."""

    n_messages: int = len(ANSWER)
    status: grpc.StatusCode = grpc.StatusCode.OK
    empty_first: bool = False  # Serve's Python proxy sends a refused stream so
    only_logprobs: bool = False  # a message with tokens but without text
    silent: bool = False
    retry_after_s: float | None = None  # in the details of the status
    details: str = "as told"  # of the status; a good answer has it as first text, as the model's name and as token

    @property
    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """Return a google.rpc.Status, as any server of gRPC sends it."""
        if self.retry_after_s is None:
            return ()
        status = status_pb2.Status(code=self.status.value[0], message=self.details)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason="TOLD"))
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(round(self.retry_after_s * 1e9))
        status.details.add().Pack(info)
        return (("grpc-status-details-bin", status.SerializeToString()),)


@dataclass
class Scripted(TinyLMServicer):
    """Answers each attempt with the next act, and repeats the last one.

    A stream with the prompt "endless" continues until it is cancelled or `released`.
    """

    acts: list[Act] = field(default_factory=lambda: [Act()])
    timeouts_s: list[float] = field(default_factory=list)  # the time limit of each attempt
    metadata: dict[str, str] = field(default_factory=dict)  # of the last attempt
    released: threading.Event = field(default_factory=threading.Event)
    cancelled: int = 0
    open_streams: int = 0  # endless streams now
    most_streams: int = 0  # at the same time

    async def _begin_whole(self, context: grpc.aio.ServicerContext) -> Act:
        act = await self._begin(context)
        if act.status is not grpc.StatusCode.OK:
            await context.abort(act.status, act.details, act.trailing_metadata)
        return act

    async def _begin(self, context: grpc.aio.ServicerContext) -> Act:
        self.timeouts_s.append(context.time_remaining())
        self.metadata = dict(context.invocation_metadata())
        act = self.acts[min(len(self.timeouts_s), len(self.acts)) - 1]
        if act.silent:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return act

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        await self._begin_whole(context)
        return pb.GenerateResponse(text="".join(ANSWER), finish_reason=pb.FINISH_REASON_LENGTH)

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        act = await self._begin_whole(context)
        return pb.TokenizeResponse(tokens=[pb.Token(bytes=act.details.encode())])

    async def Explain(self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext) -> pb.ExplainResponse:
        await self._begin_whole(context)
        return pb.ExplainResponse()

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        act = await self._begin_whole(context)
        return pb.GetModelInfoResponse(name=act.details)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        if request.prompt == "endless":
            async for message in self._endless():
                yield message
        act = await self._begin(context)
        if act.empty_first:
            yield pb.GenerateStreamResponse()
        if act.details != Act.details and act.status is grpc.StatusCode.OK:
            yield pb.GenerateStreamResponse(text=act.details)
        if act.only_logprobs:
            yield pb.GenerateStreamResponse(logprobs=[pb.TokenLogprob(logprob=-1)])
        for text in ANSWER[: act.n_messages]:
            yield pb.GenerateStreamResponse(text=text)
        if act.status is not grpc.StatusCode.OK:
            await context.abort(act.status, act.details, act.trailing_metadata)
        if act.n_messages == len(ANSWER):
            yield pb.GenerateStreamResponse(finish_reason=pb.FINISH_REASON_LENGTH)

    async def _endless(self) -> AsyncIterator[pb.GenerateStreamResponse]:
        self.open_streams += 1
        self.most_streams = max(self.most_streams, self.open_streams)
        try:
            while not self.released.is_set():
                yield pb.GenerateStreamResponse(text=".")
                await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open_streams -= 1


class Loop:
    """An event loop in a thread, for servers of synchronous tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextmanager
def scripted_server() -> Iterator[tuple[Scripted, int]]:
    """Yield the server and its port."""
    loop, servicer = Loop(), Scripted()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        add_TinyLMServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(start())
    try:
        yield servicer, port
    finally:
        loop.run(server.stop(0))
        loop.stop()


class Forwarder:
    """Forwards TCP to a port of this machine. While `blocked`, it accepts all data and forwards none."""

    def __init__(self, port: int) -> None:
        self.blocked = False
        self._target = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = self.blocked  # a connection that begins blocked stays blocked
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink, lost))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, lost: bool) -> None:
        while data := await source.read(65536):
            lost = lost or self.blocked
            if not lost:
                sink.write(data)
        sink.close()


@contextmanager
def forwarder(port: int) -> Iterator[tuple[Forwarder, int]]:
    """Yield the forwarder and its port."""
    loop, forward = Loop(), Forwarder(port)
    own_port = loop.run(forward.start())
    try:
        yield forward, own_port
    finally:
        loop.run(forward.stop())
        loop.stop()

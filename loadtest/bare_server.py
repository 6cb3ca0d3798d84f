"""The same engine behind nothing but grpc.aio: what Ray Serve adds is the difference to this. Not for production.

    python -m loadtest.bare_server --port 9200 --processes 4

Several processes share the port by SO_REUSEPORT: the kernel gives each new connection to one of them, by chance, and
every request on that connection goes there. Health, reflection, limits on sizes: none.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import grpc

from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine
from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.llm import load
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server
from tinylm.wire import ending, params_from_request


class Bare(TinyLMServicer):
    """One engine with what `configs/serve.yaml` gives each replica. Make it inside the event loop."""

    def __init__(self, model: Path) -> None:
        self._tokenizer, loaded = load(model)
        self._engine = AsyncEngine(Engine(loaded, n_slots=16, max_waiting=64, prefill_tokens=64))
        self._name, self._replica = model.name, f"process {os.getpid()}"

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        async with aclosing(self._deltas(request, context, math.inf)) as deltas:
            async for _, _, completion in deltas:
                if completion is not None:
                    return pb.GenerateResponse(text=completion.text, **ending(completion, self._replica))
        raise RuntimeError("the answer never ended")

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        async with aclosing(self._deltas(request, context, STREAM_INTERVAL_S)) as deltas:
            n_sent = 0
            async for text, n_taken, completion in deltas:
                end = {} if completion is None else ending(completion, self._replica)
                if text or end:
                    yield pb.GenerateStreamResponse(text=text, tokens=n_taken - n_sent, **end)
                    n_sent = n_taken

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        arithmetic = self._engine.engine.model.arithmetic
        return pb.GetModelInfoResponse(name=self._name, arithmetic=arithmetic, replica=self._replica)

    async def _deltas(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext, every_s: float
    ) -> AsyncGenerator[tuple[str, int, Completion | None], None]:
        """Text as it becomes certain, and of how many tokens so far; the completion comes with the last."""
        builder: CompletionBuilder | None = None
        try:
            ids = self._tokenizer.encode_document(request.prompt)
            async with aclosing(self._engine.generate(ids, params_from_request(request), every_s=every_s)) as updates:
                async for sequence in updates:
                    builder = builder or CompletionBuilder(sequence, self._tokenizer)
                    text = builder.take()
                    yield text, builder.n_taken, builder.completion
                    if builder.completion is not None:
                        return
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EngineFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


async def serve(model: Path, port: int) -> None:
    """Serve on loopback, sharing the port with whoever else does, until SIGTERM or SIGINT."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    add_TinyLMServicer_to_server(Bare(model), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"ready on 127.0.0.1:{port}", flush=True)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
    await server.stop(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bare_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one and says which")
    parser.add_argument("--processes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=Path("models/stories-8m"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}: it must be at least 1")
    with socket.socket() as reserved:  # bound and not listening: it keeps the port and gets no connection
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", arguments.port))
        port = reserved.getsockname()[1]
        if arguments.processes == 1:
            asyncio.run(serve(arguments.model, port))
        else:
            _serve_in_processes(arguments.model, port, arguments.processes)


def _serve_in_processes(model: Path, port: int, n_processes: int) -> None:
    """So many of this same program with one process each; says that it is ready when all are."""
    own = [sys.executable, "-m", "loadtest.bare_server", "--model", str(model), "--port", str(port)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    processes = [subprocess.Popen(own, stdout=subprocess.PIPE, text=True) for _ in range(n_processes)]
    try:
        if all(process.stdout and process.stdout.readline() for process in processes):
            print(f"ready on 127.0.0.1:{port}", flush=True)
            processes[0].wait()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    main()

"""The engine behind a plain `grpc.aio` server, to measure what Ray Serve adds. Not for production.

    python -m loadtest.bench.bare_server --port 9200

Several of these servers can share a port: the kernel gives each new connection to one of them at random. There is no
health check, no reflection and no limit on sizes.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import grpc
import typer

from loadtest.stub_server import serve
from tinylm.client.wire import ending, params_from_request
from tinylm.engine import Engine, EngineFull
from tinylm.engine.async_engine import STREAM_INTERVAL_S, AsyncEngine, Listener
from tinylm.engine.completion import Completion, CompletionBuilder
from tinylm.llm import load
from tinylm.terminal.output import one_line_errors
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer


class BareServicer(TinyLMServicer):
    """One engine with the settings that `configs/serve.yaml` gives each replica. Create it inside the event loop."""

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
        """Yield new text, the number of tokens so far, and at the end the completion."""
        try:
            ids, params = self._tokenizer.encode_document(request.prompt), params_from_request(request)
            builder = CompletionBuilder(self._tokenizer, params)
            async with aclosing(self._engine.generate(ids, params, listener=Listener(every_s))) as updates:
                async for progress in updates:
                    text = builder.take(progress)
                    yield text, builder.n_taken, builder.completion
                    if builder.completion is not None:
                        return
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EngineFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


async def serve_model(model: Path, port: int) -> None:
    """Serve on the loopback address until SIGTERM or SIGINT."""
    await serve(BareServicer(model), port, share_port=True, grace_s=1)


def main(
    port: Annotated[int, typer.Option(help="0 takes a free port, which the output names.")] = 0,
    model: Annotated[Path, typer.Option(metavar="DIR", help="The model directory.")] = Path("models/stories-8m"),
) -> None:
    """Serve the engine behind a plain grpc.aio server."""
    with one_line_errors(ValueError):
        asyncio.run(serve_model(model, port))


if __name__ == "__main__":
    typer.run(main)

"""A TinyLM service without a model and with known delays, to check the load generator.

    python -m loadtest.stub_server --port 9100 --delay-ms 5:0.5,20:0.4,80:0.1 --token-ms 2

Each call waits for a delay drawn from the mix. Then it sends the requested tokens, `--tokens-a-message` at a time and
`--token-ms` apart. With `--freeze-after-s 2 --freeze-s 1`, the server stops for one second, two seconds after its first
call.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Optional

import grpc
import typer

from loadtest.load import Mix
from tinylm.terminal.output import one_line_errors
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server

DRAWS = 10_000


@dataclass(frozen=True)
class Behaviour:
    """How the stub answers."""

    delays: Mix  # in ms, before the first token
    token_s: float  # for each further token
    tokens_a_message: int  # of a stream
    tells_tokens: bool  # whether messages say how many tokens they carry
    freeze_after_s: float  # after the first call
    freeze_s: float
    api_key: str | None  # calls without this key fail


class StubServicer(TinyLMServicer):
    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._delays_s = (behaviour.delays.draw(DRAWS, seed=1) / 1000).tolist()
        self._n_calls = 0

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Check the key, start the freeze with the first call, and wait for the next delay."""
        key = self._behaviour.api_key
        if key and ("authorization", f"Bearer {key}") not in (context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call has no valid API key")
        self._n_calls += 1
        if self._n_calls == 1 and self._behaviour.freeze_s:  # stops the whole event loop
            asyncio.get_running_loop().call_later(self._behaviour.freeze_after_s, time.sleep, self._behaviour.freeze_s)
        if delay := self._delays_s[self._n_calls % DRAWS]:
            await asyncio.sleep(delay)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        await self._admit(context)
        if self._behaviour.token_s:
            await asyncio.sleep(self._behaviour.token_s * (request.max_tokens - 1))
        return pb.GenerateResponse(text="a" * request.max_tokens, **_ending(request))

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        await self._admit(context)
        behaviour, left = self._behaviour, request.max_tokens
        while left:
            n = min(behaviour.tokens_a_message, left)
            left -= n
            logprobs = [pb.TokenLogprob(token=2)] * n if request.HasField("logprobs") else []
            ending = {} if left else _ending(request)
            tokens = n if behaviour.tells_tokens else 0
            yield pb.GenerateStreamResponse(text="a" * n, tokens=tokens, logprobs=logprobs, **ending)
            if left and behaviour.token_s:
                await asyncio.sleep(behaviour.token_s * min(behaviour.tokens_a_message, left))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(name="stub", replica="stub")


def _ending(request: pb.GenerateRequest) -> dict[str, Any]:
    usage = pb.Usage(prompt_tokens=1, completion_tokens=request.max_tokens)
    return {"finish_reason": pb.FINISH_REASON_LENGTH, "usage": usage, "replica": "stub"}


async def serve(behaviour: Behaviour, port: int) -> None:
    """Serve on the loopback address until the process is interrupted."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_TinyLMServicer_to_server(StubServicer(behaviour), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"ready on 127.0.0.1:{bound}", flush=True)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(0)  # otherwise gRPC sometimes complains that the event loop has ended


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Run a stub server with these arguments, and yield its address. Raises RuntimeError if it does not start."""
    command = [sys.executable, "-m", "loadtest.stub_server", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("ready on "):
            raise RuntimeError(f"the stub server did not start: {' '.join(command)}")
        yield line.removeprefix("ready on ").strip()
    finally:
        process.terminate()
        process.wait(10)


def main(
    port: Annotated[int, typer.Option(help="0 takes a free port, which the output names.")] = 0,
    delay_ms: Annotated[str, typer.Option(metavar="MS[:SHARE],...", help="Delays before the first token.")] = "0",
    token_ms: Annotated[float, typer.Option(help="Time for each further token.")] = 0,
    tokens_a_message: Annotated[int, typer.Option(help="Tokens in each message of a stream.")] = 1,
    untold: Annotated[bool, typer.Option("--untold", help="Messages do not say how many tokens they carry.")] = False,
    freeze_after_s: Annotated[float, typer.Option(help="Seconds from the first call to the freeze.")] = 1,
    freeze_s: Annotated[float, typer.Option(help="Seconds for which the server stops.")] = 0,
    api_key: Annotated[Optional[str], typer.Option(help="Refuse calls without this key.")] = None,
) -> None:
    """Run a TinyLM service without a model and with known delays."""
    with one_line_errors(ValueError):
        delays = Mix.parse(delay_ms, "--delay-ms", least=0)
        behaviour = Behaviour(delays, token_ms / 1000, tokens_a_message, not untold, freeze_after_s, freeze_s, api_key)
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(behaviour, port))


if __name__ == "__main__":
    typer.run(main)

"""A TinyLM service without a model and with known delays, to check the load generator.

    python -m loadtest.stub_server --port 9100 --delay-ms 5:0.5,20:0.4,80:0.1 --token-ms 2

Each call waits for a delay drawn from the mix. Then it sends the requested tokens, `--tokens-a-message` at a time and
`--token-ms` apart. With `--freeze-after-s 2 --freeze-s 1`, the server stops for one second, two seconds after its first
call.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Optional

import grpc
import typer

from loadtest.load import Mix
from tinylm.terminal.output import one_line_errors
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server

DRAWS = 10_000


class StubServicer(TinyLMServicer):
    def __init__(
        self,
        delays: Mix,
        token_s: float,
        tokens_a_message: int,
        tells_tokens: bool,
        freeze_after_s: float,
        freeze_s: float,
        api_key: str | None,
    ) -> None:
        """delays: in ms, before the first token. token_s: for each further token.

        tells_tokens: whether messages say how many tokens they carry. freeze_after_s: from the first call.
        api_key: calls without it fail.
        """
        self._delays_s = (delays.draw(DRAWS, seed=1) / 1000).tolist()
        self._token_s, self._tokens_a_message, self._tells_tokens = token_s, tokens_a_message, tells_tokens
        self._freeze_after_s, self._freeze_s = freeze_after_s, freeze_s
        self._api_key = api_key
        self._n_calls = 0

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Check the key, start the freeze with the first call, and wait for the next delay."""
        key = ("authorization", f"Bearer {self._api_key}")
        if self._api_key and key not in (context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call has no valid API key")
        self._n_calls += 1
        if self._n_calls == 1 and self._freeze_s:  # stops the whole event loop
            asyncio.get_running_loop().call_later(self._freeze_after_s, time.sleep, self._freeze_s)
        if delay := self._delays_s[self._n_calls % DRAWS]:
            await asyncio.sleep(delay)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        await self._admit(context)
        if self._token_s:
            await asyncio.sleep(self._token_s * (request.max_tokens - 1))
        return pb.GenerateResponse(text="a" * request.max_tokens, **_ending(request))

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        await self._admit(context)
        left = request.max_tokens
        while left:
            n = min(self._tokens_a_message, left)
            left -= n
            ending = {} if left else _ending(request)
            tokens = n if self._tells_tokens else 0
            yield pb.GenerateStreamResponse(text="a" * n, tokens=tokens, **ending)
            if left and self._token_s:
                await asyncio.sleep(self._token_s * min(self._tokens_a_message, left))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(name="stub", replica="stub")


def _ending(request: pb.GenerateRequest) -> dict[str, Any]:
    usage = pb.Usage(prompt_tokens=1, completion_tokens=request.max_tokens)
    return {"finish_reason": pb.FINISH_REASON_LENGTH, "usage": usage, "replica": "stub"}


async def serve(servicer: TinyLMServicer, port: int, share_port: bool = False, grace_s: float = 0) -> None:
    """Serve on the loopback address until SIGTERM or SIGINT. Open calls may then take `grace_s` more.

    share_port: other processes may serve on the same port.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", int(share_port))])
    add_TinyLMServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"ready on 127.0.0.1:{bound}", flush=True)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()
    await server.stop(grace_s)


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
    untold: Annotated[bool, typer.Option("--untold", help="Leave the number of tokens out of the messages.")] = False,
    freeze_after_s: Annotated[float, typer.Option(help="Seconds from the first call to the freeze.")] = 1,
    freeze_s: Annotated[float, typer.Option(help="Seconds for which the server stops.")] = 0,
    api_key: Annotated[Optional[str], typer.Option(help="Refuse calls without this key.")] = None,
) -> None:
    """Run a TinyLM service without a model and with known delays."""
    with one_line_errors(ValueError):
        delays = Mix.parse(delay_ms, "--delay-ms", least=0)
        servicer = StubServicer(
            delays, token_ms / 1000, tokens_a_message, not untold, freeze_after_s, freeze_s, api_key
        )
        asyncio.run(serve(servicer, port))


if __name__ == "__main__":
    typer.run(main)

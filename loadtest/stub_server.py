"""A TinyLM service without a model, whose delays are known: to measure what measures.

    python -m loadtest.stub_server --port 9100 --delay-ms 5:0.5,20:0.4,80:0.1 --token-ms 2

It waits a delay drawn from the mix, then sends the tokens asked for, `--tokens-a-message` at a time and `--token-ms`
apart. `--freeze-after-s 2 --freeze-s 1`: two seconds after its first call it does nothing at all for one second.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import grpc

from loadtest.load import Mix
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMServicer, add_TinyLMServicer_to_server

DRAWS = 10_000


class Stub(TinyLMServicer):
    def __init__(self, arguments: argparse.Namespace) -> None:
        delays = Mix.parse(arguments.delay_ms, "--delay-ms", least=0)
        self._delays_s = (delays.draw(DRAWS, seed=1) / 1000).tolist()
        self._token_s = arguments.token_ms / 1000
        self._per_message, self._tells = arguments.tokens_a_message, not arguments.untold
        self._freeze_after_s, self._freeze_s = arguments.freeze_after_s, arguments.freeze_s
        self._api_key = arguments.api_key
        self._n_calls = 0

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        """Check the key, freeze when it is time, wait the next delay."""
        if self._api_key and ("authorization", f"Bearer {self._api_key}") not in (context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a stub with a key wants it")
        self._n_calls += 1
        if self._n_calls == 1 and self._freeze_s:  # the whole event loop stands still
            asyncio.get_running_loop().call_later(self._freeze_after_s, time.sleep, self._freeze_s)
        if delay := self._delays_s[self._n_calls % DRAWS]:
            await asyncio.sleep(delay)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        await self._admit(context)
        if self._token_s:
            await asyncio.sleep(self._token_s * (request.max_tokens - 1))
        return pb.GenerateResponse(text="a" * request.max_tokens, **self._ending(request))

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        await self._admit(context)
        left = request.max_tokens
        while left:
            n = min(self._per_message, left)
            left -= n
            logprobs = [pb.TokenLogprob(token=2)] * n if request.HasField("logprobs") else []
            ending = {} if left else self._ending(request)
            tokens = n if self._tells else 0
            yield pb.GenerateStreamResponse(text="a" * n, tokens=tokens, logprobs=logprobs, **ending)
            if left and self._token_s:
                await asyncio.sleep(self._token_s * min(self._per_message, left))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(name="stub", replica="stub")

    def _ending(self, request: pb.GenerateRequest) -> dict:
        usage = pb.Usage(prompt_tokens=1, completion_tokens=request.max_tokens)
        return {"finish_reason": pb.FINISH_REASON_LENGTH, "usage": usage, "replica": "stub"}


async def serve(arguments: argparse.Namespace) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_TinyLMServicer_to_server(Stub(arguments), server)
    port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    await server.start()
    print(f"ready on 127.0.0.1:{port}", flush=True)
    try:
        await server.wait_for_termination()
    finally:
        await server.stop(0)  # left to itself it complains, now and then, that the event loop has ended before it


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """The address of a stub server with these arguments; it ends with the block. Raises RuntimeError."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.stub_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one and says which")
    parser.add_argument("--delay-ms", default="0", help="before the first token, a mix; default: %(default)s")
    parser.add_argument("--token-ms", type=float, default=0, help="for each further token; default: %(default)s")
    parser.add_argument("--tokens-a-message", type=int, default=1, help="of a stream; default: %(default)s")
    parser.add_argument("--untold", action="store_true", help="messages don't say how many tokens they carry")
    parser.add_argument("--freeze-after-s", type=float, default=1)
    parser.add_argument("--freeze-s", type=float, default=0)
    parser.add_argument("--api-key", help="refuse calls without it")
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()

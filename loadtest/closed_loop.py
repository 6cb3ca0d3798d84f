"""The closed loop: clients that ask, wait and ask again, and what each answer took. Adds nothing up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tinylm.client import CHANNEL_OPTIONS, METADATA
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "There was once an old bear who lived in the woods. Every morning",
    '"Where are you going?" asked the fox.',
)
CALL_LIMIT_S = 60.0  # a call that takes longer counts as DEADLINE_EXCEEDED
ERROR_PAUSE_S = 0.05  # after a failed call, so that a service that refuses is not asked in a busy loop


@dataclass(frozen=True)
class Load:
    """What to ask and how hard."""

    server: str
    concurrency: int
    duration_s: float
    warmup_s: float
    max_tokens: int
    stream: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One call as its client saw it. Times are `time.perf_counter()` seconds."""

    sent_at: float
    first_text_at: float | None  # of a stream
    ended_at: float
    status: str  # the gRPC status's name
    tokens: int
    replica: str


async def run_load(load: Load, show: Callable[[float, int], None] = lambda elapsed_s, answers: None) -> list[Answer]:
    """Every answer that ended inside the measured time; `show` is called now and then with progress."""
    channel_options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # a connection for each client
    begin = time.perf_counter()
    end = begin + load.warmup_s + load.duration_s
    answers: list[Answer] = []

    async def client(number: int) -> None:
        async with grpc.aio.insecure_channel(load.server, options=channel_options) as channel:
            stub = TinyLMStub(channel)
            turn = number
            while time.perf_counter() < end:
                answer = await ask(stub, load, turn)
                answers.append(answer)
                turn += load.concurrency
                if answer.status != "OK":
                    await asyncio.sleep(ERROR_PAUSE_S)

    async def watch() -> None:
        while True:
            show(time.perf_counter() - begin, len(answers))
            await asyncio.sleep(0.25)

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.gather(*(client(number) for number in range(load.concurrency)))
    finally:
        watcher.cancel()
    return [answer for answer in answers if begin + load.warmup_s <= answer.ended_at <= end]


async def ask(stub: TinyLMStub, load: Load, turn: int) -> Answer:
    """One call, prompt and seed following from its turn; a failed one is an answer with its status."""
    request = pb.GenerateRequest(prompt=PROMPTS[turn % len(PROMPTS)], max_tokens=load.max_tokens, seed=turn)
    first_text_at: float | None = None
    last: pb.GenerateResponse | pb.GenerateStreamResponse | None = None
    status = "OK"
    sent_at = time.perf_counter()
    try:
        if load.stream:
            async for message in stub.GenerateStream(request, metadata=METADATA, timeout=CALL_LIMIT_S):
                last = message
                first_text_at = first_text_at or time.perf_counter()
        else:
            last = await stub.Generate(request, metadata=METADATA, timeout=CALL_LIMIT_S)
    except grpc.aio.AioRpcError as error:
        status = error.code().name
    ended_at = time.perf_counter()
    tokens = last.usage.completion_tokens if last is not None else 0
    return Answer(sent_at, first_text_at, ended_at, status, tokens, last.replica if last is not None else "")

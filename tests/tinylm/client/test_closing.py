"""How a call ends early: the client is closed, a task is cancelled, or the caller leaves a stream."""

import asyncio
import gc
from collections.abc import Callable
from contextlib import suppress

import grpc
import pytest
from helpers.client import WAIT_S, Act, Scripted, wait_until

from tinylm.client import AsyncClient, Client, ServiceError, attempts

CALLS = {
    "generate": lambda client: client.generate("x"),
    "stream": lambda client: client.stream("x"),
    "begun stream": lambda client: client.stream("endless"),
    "tokenize": lambda client: client.tokenize("x"),
    "info": lambda client: client.info(),
}
CLOSED = "this client has been closed"


@pytest.fixture(autouse=True)
def silent(server: Scripted) -> None:
    server.acts = [Act(silent=True)]


def has_call(server: Scripted) -> Callable[[], bool]:
    return lambda: bool(server.timeouts_s or server.open_streams)


async def finished(call):
    """Wait for what an AsyncClient returned: an awaitable, or a stream."""
    if not hasattr(call, "__aiter__"):
        return await call
    async for _ in call:
        pass


def start(client: Client | AsyncClient, call) -> asyncio.Task:
    """Start a call in another thread or task."""
    if isinstance(client, AsyncClient):
        return asyncio.create_task(finished(call(client)))
    return asyncio.create_task(asyncio.to_thread(lambda: list(call(client))))


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("call", "is_pausing"), [*((call, False) for call in CALLS), ("generate", True), ("stream", True)]
)
def test_close_ends_a_running_call(client_type, call, is_pausing, server: Scripted, address: str, monkeypatch):
    """The caller gets ServiceError. CancelledError would end a TaskGroup without any error."""
    if is_pausing:  # the call has failed, and its retry is an hour away
        monkeypatch.setattr(attempts, "FIRST_PAUSE_S", 3600)
        server.acts = [Act(0, grpc.StatusCode.UNAVAILABLE)]

    async def close_meanwhile():
        client = client_type(address, timeout_s=None)
        running = start(client, CALLS[call])
        await asyncio.to_thread(wait_until, has_call(server))
        closed = client.close()
        if closed is not None:
            await closed
        with pytest.raises(ServiceError, match=CLOSED) as caught:
            await asyncio.wait_for(running, WAIT_S)
        assert caught.value.code == grpc.StatusCode.CANCELLED
        with pytest.raises(ServiceError, match=CLOSED):
            await start(client, CALLS[call])

    asyncio.run(close_meanwhile())


@pytest.mark.parametrize("call", CALLS)
def test_a_cancelled_task_stays_cancelled(call, server: Scripted, address: str):
    """This holds although the client is closed at once, and although the task ignored an earlier cancellation."""

    async def cancel():
        client = AsyncClient(address)

        async def call_after_a_cancellation():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(WAIT_S)
            await finished(CALLS[call](client))

        task = asyncio.create_task(call_after_a_cancellation())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.to_thread(wait_until, has_call(server))
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


def test_an_async_client_may_close_before_its_first_call(address: str):
    client = AsyncClient(address)
    asyncio.run(client.close())
    with pytest.raises(ServiceError, match=CLOSED):
        asyncio.run(client.generate("x"))


def leave_loop(client: Client) -> None:
    for _ in client.stream("endless"):
        break


def close_stream(client: Client) -> None:
    stream = client.stream("endless")
    next(stream)
    stream.close()


def fail_in_block(client: Client) -> None:
    with suppress(ZeroDivisionError), client.stream("endless") as stream:
        for _ in stream:
            _ = 1 / 0


@pytest.mark.parametrize("leave", [leave_loop, close_stream, fail_in_block])
def test_leaving_a_stream_ends_its_call(leave: Callable[[Client], None], server: Scripted, address: str):
    with Client(address) as client:
        leave(client)
        gc.collect()
        wait_until(lambda: (server.cancelled, server.open_streams) == (1, 0))


def test_a_stream_closed_before_its_call_is_empty(address: str):
    with Client(address) as client:
        stream = client.stream("endless")
        stream.close()
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.completion


async def leave_async_loop(client: AsyncClient, server: Scripted) -> None:
    async for _ in client.stream("endless"):
        break


async def close_async_stream(client: AsyncClient, server: Scripted) -> None:
    async with client.stream("endless") as stream:
        await anext(stream)


async def cancel_task(client: AsyncClient, server: Scripted) -> None:
    task = asyncio.create_task(finished(client.stream("endless")))
    await asyncio.to_thread(wait_until, lambda: server.open_streams == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_whole_answer(client: AsyncClient, server: Scripted) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.generate("x")


@pytest.mark.parametrize("leave", [leave_async_loop, close_async_stream, cancel_task, cancel_whole_answer])
def test_leaving_an_async_answer_ends_its_call(leave, server: Scripted, address: str):
    async def run() -> None:
        async with AsyncClient(address) as client:
            await leave(client, server)
            await asyncio.to_thread(wait_until, lambda: (server.cancelled, server.open_streams) == (1, 0))

    asyncio.run(run())

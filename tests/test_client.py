"""Both clients against a real small server that fails as it is told: what is repeated, what is raised, what is ended.

The real service has its share in test_service.py.
"""

import asyncio
import gc
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import grpc
import pytest
from client_fixtures import ANSWER, Act, Scripted, forwarder, scripted_server

import tinylm
from tinylm.client import RETRIED, AsyncClient, Client, ServiceError

WAIT_S = 20
Code = grpc.StatusCode
TEXT = "".join(ANSWER)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Scripted, int]]:
    with scripted_server() as running:
        yield running


@pytest.fixture
def server(running: tuple[Scripted, int]) -> Scripted:
    servicer, _ = running
    servicer.acts, servicer.timeouts_s, servicer.cancelled = [Act()], [], 0
    return servicer


@pytest.fixture
def address(running: tuple[Scripted, int]) -> str:
    return f"127.0.0.1:{running[1]}"


def plain(address: str, streamed: bool, pieces: list[str], **settings: object):
    with Client(address, **settings) as client:
        if not streamed:
            return client.generate("x")
        stream = client.stream("x")
        for piece in stream:
            pieces.append(piece)
        return stream.completion


def asynchronous(address: str, streamed: bool, pieces: list[str], **settings: object):
    async def ask():
        async with AsyncClient(address, **settings) as client:
            if not streamed:
                return await client.generate("x")
            stream = client.stream("x")
            async for piece in stream:
                pieces.append(piece)
            return stream.completion

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [plain, asynchronous])
whole_and_streamed = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@both
@whole_and_streamed
@pytest.mark.parametrize("code", sorted(RETRIED, key=lambda code: code.name), ids=lambda code: code.name)
def test_a_call_that_has_produced_nothing_is_repeated(ask, streamed: bool, code: Code, server: Scripted, address: str):
    server.acts = [Act(0, code), Act(0, code, empty_first=True), Act()]
    pieces: list[str] = []
    completion = ask(address, streamed, pieces)
    assert completion.text == TEXT
    assert completion.attempts == len(server.timeouts_s) == 3
    assert pieces == (ANSWER if streamed else [])


def test_a_call_under_way_when_its_client_is_closed_has_failed(server: Scripted, address: str):
    """Not as a bad request, which is what ValueError means here."""
    server.acts = [Act(silent=True)]
    client = Client(address)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "x")
        wait_until(lambda: bool(server.timeouts_s))
        client.close()
        with pytest.raises(ServiceError, match="this client has been closed") as caught:
            call.result(WAIT_S)
    assert caught.value.code == Code.CANCELLED
    with pytest.raises(ServiceError, match="this client has been closed"):
        client.generate("x")


@both
@pytest.mark.parametrize("n_messages", [1, 2])
@pytest.mark.parametrize("code", [*sorted(RETRIED, key=lambda code: code.name), Code.OK], ids=lambda code: code.name)
def test_a_stream_is_never_repeated_after_its_first_piece(ask, n_messages, code, server: Scripted, address: str):
    """An end without the last message is a break too, whatever its status says."""
    server.acts = [Act(n_messages, code), Act()]
    pieces: list[str] = []
    with pytest.raises(ServiceError) as caught:
        ask(address, True, pieces)
    assert pieces == ANSWER[:n_messages]
    assert len(server.timeouts_s) == caught.value.attempts == 1
    assert caught.value.code is (Code.UNAVAILABLE if code is Code.OK else code)


@both
def test_tokens_without_text_yet_count_as_a_beginning(ask, server: Scripted, address: str):
    server.acts = [Act(0, Code.UNAVAILABLE, only_logprobs=True), Act()]
    with pytest.raises(ServiceError):
        ask(address, True, [])
    assert len(server.timeouts_s) == 1


@both
def test_a_stream_that_ends_with_nothing_is_repeated(ask, server: Scripted, address: str):
    server.acts = [Act(0, Code.OK), Act()]
    assert ask(address, True, []).attempts == 2


@both
@whole_and_streamed
@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        (Code.INVALID_ARGUMENT, ValueError, "^as told$"),
        (Code.RESOURCE_EXHAUSTED, ServiceError, "RESOURCE_EXHAUSTED: as told"),
        (Code.UNAUTHENTICATED, ServiceError, "TINYLM_API_KEY"),
        (Code.PERMISSION_DENIED, ServiceError, "PERMISSION_DENIED"),
        (Code.UNIMPLEMENTED, ServiceError, "is it TinyLM that serves at 127.0.0.1"),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else None,
)
def test_other_statuses_are_raised_at_once(ask, streamed, code, error, told, server: Scripted, address: str):
    server.acts = [Act(0, code), Act()]
    with pytest.raises(error, match=told):
        ask(address, streamed, [])
    assert len(server.timeouts_s) == 1


@both
@whole_and_streamed
def test_retries_are_limited_and_the_error_names_the_address(ask, streamed: bool, server: Scripted, address: str):
    server.acts = [Act(0, Code.UNAVAILABLE)]
    with pytest.raises(ServiceError, match=f"UNAVAILABLE: as told .*{address}, asked 3 times") as caught:
        ask(address, streamed, [], retries=2)
    assert len(server.timeouts_s) == caught.value.attempts == 3


@both
@whole_and_streamed
def test_the_deadline_is_that_of_all_attempts_together(ask, streamed: bool, server: Scripted, address: str):
    server.acts = [Act(0, Code.UNAVAILABLE)]
    with pytest.raises(ServiceError, match="UNAVAILABLE"):
        ask(address, streamed, [], timeout_s=1.0, retries=1000)
    given = server.timeouts_s
    assert 2 <= len(given) < 8
    assert given == sorted(given, reverse=True)
    assert given[0] - given[-1] > 0.2, "each attempt is given what is left, which pauses shorten too"
    server.acts, server.timeouts_s = [Act(0, Code.UNAVAILABLE), Act(silent=True)], []
    with pytest.raises(ServiceError, match=r"DEADLINE_EXCEEDED.*timeout_s is 0.5"):
        ask(address, streamed, [], timeout_s=0.5)
    assert len(server.timeouts_s) == 2
    wait_until(lambda: server.cancelled == 1)


@both
def test_a_place_where_nobody_is_is_unavailable(ask):
    with pytest.raises(ServiceError, match=r"UNAVAILABLE.*localhost:1") as caught:
        ask("localhost:1", False, [], retries=0)
    assert caught.value.code is Code.UNAVAILABLE


def test_leaving_a_plain_stream_ends_the_call(server: Scripted, address: str):
    def left_alone(client: Client) -> None:
        for _ in client.stream("endless"):
            break

    def closed(client: Client) -> None:
        stream = client.stream("endless")
        next(stream)
        stream.close()

    def broken(client: Client) -> None:
        with suppress(ZeroDivisionError), client.stream("endless") as stream:
            for _ in stream:
                _ = 1 / 0

    with Client(address) as client:
        for number, leave in enumerate((left_alone, closed, broken), 1):
            leave(client)
            gc.collect()
            wait_until(lambda n=number: (server.cancelled, server.open_streams) == (n, 0))
        never_begun = client.stream("endless")
        never_begun.close()
        assert list(never_begun) == []
        with pytest.raises(RuntimeError, match="no completion"):
            _ = never_begun.completion


def test_leaving_an_asynchronous_stream_or_its_task_ends_the_call(server: Scripted, address: str):
    async def left_alone(client: AsyncClient) -> None:
        async for _ in client.stream("endless"):
            break

    async def closed(client: AsyncClient) -> None:
        async with client.stream("endless") as stream:
            await anext(stream)

    async def task_cancelled(client: AsyncClient) -> None:
        async def read() -> None:
            async for _ in client.stream("endless"):
                pass

        task = asyncio.create_task(read())
        await settled(lambda: server.open_streams == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def whole_cancelled(client: AsyncClient) -> None:
        server.acts = [Act(silent=True)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("x")

    async def settled(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not true():
                await asyncio.sleep(0.01)

    async def run() -> None:
        async with AsyncClient(address) as client:
            for number, leave in enumerate((left_alone, closed, task_cancelled, whole_cancelled), 1):
                await leave(client)
                await settled(lambda n=number: (server.cancelled, server.open_streams) == (n, 0))

    asyncio.run(run())


def test_a_connection_that_goes_silent_is_noticed_and_not_waited_for(server: Scripted, running: tuple[Scripted, int]):
    """Nothing comes back, not even a status: without pings of the client's own, its deadline would end the call."""

    def outcome(ask: Callable, port: int) -> Code:
        with pytest.raises(ServiceError) as caught:
            ask(f"127.0.0.1:{port}", True, [], retries=0, timeout_s=60)
        return caught.value.code

    server.acts = [Act(silent=True)]
    with (
        forwarder(running[1]) as (forward, port),
        socket.create_server(("127.0.0.1", 0)) as mute,  # takes connections and never says a word
        ThreadPoolExecutor(3) as pool,
    ):
        outcomes = [pool.submit(outcome, ask, port) for ask in (plain, asynchronous)]
        outcomes.append(pool.submit(outcome, plain, mute.getsockname()[1]))
        wait_until(lambda: len(server.timeouts_s) == 2)
        forward.blocked = True
        assert [future.result() for future in outcomes] == [Code.UNAVAILABLE] * 3


def test_importing_the_package_imports_neither_engine_nor_grpc():
    code = "import sys, tinylm; print(sorted({'grpc', 'numpy', 'numba'} & set(sys.modules)), len(dir(tinylm)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("[] ")
    assert {name for name in tinylm.__all__ if not hasattr(tinylm, name)} == set()
    assert (tinylm.Client, tinylm.AsyncClient) == (Client, AsyncClient)
    with pytest.raises(AttributeError, match="Clyent"):
        _ = tinylm.Clyent

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
from helpers.client import ANSWER, Act, Scripted, forwarder, scripted_server
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm.client import RETRIED, AsyncClient, Client, ServiceError, common

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


CALLS = {
    "generate": lambda client: client.generate("x"),
    "stream": lambda client: client.stream("x"),
    "begun stream": lambda client: client.stream("endless"),
    "tokenize": lambda client: client.tokenize("x"),
    "info": lambda client: client.info(),
}
calls = pytest.mark.parametrize("call", CALLS)
CLOSED = "this client has been closed"


async def finished(call):
    """Wait for what an AsyncClient returned: an awaitable, or a stream."""
    if not hasattr(call, "__aiter__"):
        return await call
    async for _ in call:
        pass


@calls
def test_close_ends_a_call_of_another_thread(call: str, server: Scripted, address: str):
    """With ServiceError, not with the ValueError of a bad request."""
    server.acts = [Act(silent=True)]
    client = Client(address)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(lambda: list(CALLS[call](client)))
        wait_until(lambda: bool(server.timeouts_s or server.open_streams))
        client.close()
        with pytest.raises(ServiceError, match=CLOSED) as caught:
            result.result(WAIT_S)
    assert caught.value.code == Code.CANCELLED
    with pytest.raises(ServiceError, match=CLOSED):
        list(CALLS[call](client))


@calls
def test_close_ends_a_call_of_another_task(call: str, server: Scripted, address: str):
    """CancelledError would end a TaskGroup without any error."""
    server.acts = [Act(silent=True)]

    async def close_meanwhile():
        client = AsyncClient(address)
        result = asyncio.create_task(finished(CALLS[call](client)))
        await asyncio.to_thread(wait_until, lambda: bool(server.timeouts_s or server.open_streams))
        await client.close()
        with pytest.raises(ServiceError, match=CLOSED) as caught:
            await result
        assert caught.value.code == Code.CANCELLED
        with pytest.raises(ServiceError, match=CLOSED):
            await finished(CALLS[call](client))

    asyncio.run(close_meanwhile())


@calls
def test_a_cancelled_task_stays_cancelled(call: str, server: Scripted, address: str):
    """Also when the client is closed at once, and when the task ignored an earlier cancellation."""
    server.acts = [Act(silent=True)]

    async def cancel():
        client = AsyncClient(address)

        async def call_once_cancelled():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(WAIT_S)
            await finished(CALLS[call](client))

        task = asyncio.create_task(call_once_cancelled())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.to_thread(wait_until, lambda: bool(server.timeouts_s or server.open_streams))
        task.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


@both
def test_close_ends_the_wait_before_a_retry(ask, server: Scripted, address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common, "FIRST_PAUSE_S", 3600)
    server.acts = [Act(0, Code.UNAVAILABLE)]

    async def close_meanwhile():
        client = AsyncClient(address, timeout_s=None)
        result = asyncio.create_task(client.generate("x"))
        await asyncio.to_thread(wait_until, lambda: bool(server.timeouts_s))
        await client.close()
        await asyncio.wait_for(result, WAIT_S)

    def close_in_a_thread():
        client = Client(address, timeout_s=None)
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(client.generate, "x")
            wait_until(lambda: bool(server.timeouts_s))
            client.close()
            result.result(WAIT_S)

    with pytest.raises(ServiceError, match=CLOSED):
        close_in_a_thread() if ask is plain else asyncio.run(close_meanwhile())


def test_a_client_may_be_closed_before_its_first_call(address: str):
    client = AsyncClient(address)
    asyncio.run(client.close())
    with pytest.raises(ServiceError, match=CLOSED):
        asyncio.run(client.generate("x"))


clients = pytest.mark.parametrize("client", [Client, AsyncClient])


@clients
@given(inner=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=50))
def test_whitespace_around_a_key_does_not_count(client, inner: str):
    for space in ("\n", " \r\n", "\t"):
        sent = dict(client("localhost:1", api_key=f"{space}{inner}{space}")._metadata)
        assert sent["authorization"] == f"Bearer {inner}"


@clients
@pytest.mark.parametrize("name", ["api_key", "TINYLM_API_KEY"])
@pytest.mark.parametrize("bad", ["sec ret", "sec\nret", "secrét", "sec\x7fret", "s" * 5000])
def test_a_key_that_cannot_be_sent_is_refused_at_once(client, name: str, bad: str, monkeypatch):
    if name == "api_key":
        arguments = {"api_key": bad}
    else:
        arguments = {}
        monkeypatch.setenv(name, bad)
    with pytest.raises(ValueError, match=f"{name} must") as caught:
        client("localhost:1", **arguments)
    assert bad not in str(caught.value)


@clients
@pytest.mark.parametrize("api_key", [None, "", " \n"])
def test_a_blank_key_is_none(client, api_key: str | None, monkeypatch):
    monkeypatch.setenv("TINYLM_API_KEY", " from-the-environment\n")
    assert dict(client("localhost:1", api_key=api_key)._metadata)["authorization"] == "Bearer from-the-environment"
    monkeypatch.setenv("TINYLM_API_KEY", "\n")
    assert "authorization" not in dict(client("localhost:1", api_key=api_key)._metadata)


@both
@pytest.mark.parametrize("timeout_s", [None, float("inf"), 1e10, 1e300])
def test_a_timeout_beyond_every_clock_is_no_limit(ask, timeout_s: float | None, server: Scripted, address: str):
    assert ask(address, False, [], timeout_s=timeout_s).text == TEXT


@clients
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("timeout_s", value) for value in (float("nan"), 0, -1, float("-inf"), "60")],
        *[("retries", value) for value in (-1, 1.5, None)],
        *[("address", value) for value in ("", "local host:9000", "localhost:9000\n", None)],
    ],
)
def test_a_client_refuses_a_bad_setting(client, field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        client(**{field: value})


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

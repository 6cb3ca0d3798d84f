"""Both clients against a real small server that fails as a test tells it: retries, errors and settings.

tests/e2e/test_service.py runs them against the real service.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from helpers.client import ANSWER, Act, Scripted, forwarder, wait_until
from hypothesis import given
from hypothesis import strategies as st

import tinylm
from tinylm.client import RETRIED, AsyncClient, Client, ServiceError, attempts, connection
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

Code = grpc.StatusCode
TEXT = "".join(ANSWER)


def ask_plain(address: str, streamed: bool, pieces: list[str], **settings: object):
    with Client(address, **settings) as client:
        if not streamed:
            return client.generate("x")
        stream = client.stream("x")
        for piece in stream:
            pieces.append(piece)
        return stream.completion


def ask_async(address: str, streamed: bool, pieces: list[str], **settings: object):
    async def ask():
        async with AsyncClient(address, **settings) as client:
            if not streamed:
                return await client.generate("x")
            stream = client.stream("x")
            async for piece in stream:
                pieces.append(piece)
            return stream.completion

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [ask_plain, ask_async])
whole_and_streamed = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "FIRST_PAUSE_S", 0.001)


@both
@whole_and_streamed
def test_a_call_without_any_result_is_retried(ask, streamed: bool, server: Scripted, address: str, short_pauses):
    failures = [Act(0, code) for code in RETRIED]
    failures.append(Act(0, Code.OK) if streamed else Act(0, Code.UNAVAILABLE))  # a stream that ends without a message
    failures.append(Act(0, Code.UNAVAILABLE, empty_first=True))
    server.acts = [*failures, Act()]
    pieces: list[str] = []
    completion = ask(address, streamed, pieces, retries=len(failures))
    assert completion.text == TEXT
    assert completion.attempts == len(server.timeouts_s) == len(failures) + 1
    assert pieces == (ANSWER if streamed else [])


@both
@pytest.mark.parametrize(
    "act",
    [Act(1, Code.UNAVAILABLE), Act(2, Code.OK), Act(0, Code.UNAVAILABLE, only_logprobs=True)],
    ids=["broken", "ended too early", "tokens without text"],
)
def test_a_stream_that_has_begun_is_not_retried(ask, act: Act, server: Scripted, address: str):
    server.acts = [act, Act()]
    pieces: list[str] = []
    with pytest.raises(ServiceError) as caught:
        ask(address, True, pieces)
    assert pieces == ANSWER[: act.n_messages]
    assert len(server.timeouts_s) == caught.value.attempts == 1
    assert caught.value.code is Code.UNAVAILABLE


@both
@whole_and_streamed
@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (Code.INVALID_ARGUMENT, ValueError, "^as told$"),
        (Code.RESOURCE_EXHAUSTED, ServiceError, "RESOURCE_EXHAUSTED: as told"),
        (Code.UNAUTHENTICATED, ServiceError, "TINYLM_API_KEY"),
        (Code.PERMISSION_DENIED, ServiceError, "PERMISSION_DENIED"),
        (Code.UNIMPLEMENTED, ServiceError, "check that TinyLM is served at 127.0.0.1"),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else None,
)
def test_other_statuses_are_not_retried(ask, streamed, code, error, message, server: Scripted, address: str):
    server.acts = [Act(0, code), Act()]
    with pytest.raises(error, match=message):
        ask(address, streamed, [])
    assert len(server.timeouts_s) == 1


@both
@whole_and_streamed
def test_a_refusal_with_a_time_is_retried_after_that_time(ask, streamed: bool, server: Scripted, address: str):
    server.acts = [Act(0, Code.RESOURCE_EXHAUSTED, retry_after_s=0.3)] * 2 + [Act()]
    began_at = time.monotonic()
    assert ask(address, streamed, []).attempts == 3
    assert time.monotonic() - began_at >= 0.6


@both
@whole_and_streamed
@pytest.mark.parametrize(
    ("settings", "act"),
    [
        ({"timeout_s": 5}, Act(0, Code.RESOURCE_EXHAUSTED, retry_after_s=6)),
        ({"retries": 0}, Act(0, Code.RESOURCE_EXHAUSTED, retry_after_s=0.25)),
        ({}, Act(0, Code.RESOURCE_EXHAUSTED)),
    ],
    ids=["too late", "no retries", "full queue"],
)
def test_an_error_tells_a_limit_from_a_full_queue(ask, streamed, settings, act: Act, server: Scripted, address: str):
    server.acts = [act, Act()]
    with pytest.raises(ServiceError, match="RESOURCE_EXHAUSTED: as told") as caught:
        ask(address, streamed, [], **settings)
    assert caught.value.retry_after_s == act.retry_after_s
    assert len(server.timeouts_s) == 1


@both
@whole_and_streamed
def test_retries_end_with_an_error_that_names_the_address(ask, streamed: bool, server, address, short_pauses):
    server.acts = [Act(0, Code.UNAVAILABLE)]
    with pytest.raises(ServiceError, match=f"UNAVAILABLE: as told .*{address}, sent 3 times") as caught:
        ask(address, streamed, [], retries=2)
    assert len(server.timeouts_s) == caught.value.attempts == 3


@both
@whole_and_streamed
def test_all_attempts_share_one_timeout(ask, streamed: bool, server: Scripted, address: str):
    server.acts = [Act(0, Code.UNAVAILABLE)]
    with pytest.raises(ServiceError, match=r"UNAVAILABLE|DEADLINE_EXCEEDED"):  # the last attempt can be under way
        ask(address, streamed, [], timeout_s=1.0, retries=1000)
    given = server.timeouts_s
    assert 2 <= len(given) < 8, "pauses become longer"
    assert given == sorted(given, reverse=True)
    assert given[0] - given[-1] > 0.2, "each attempt gets the time that is left"
    server.acts, server.timeouts_s = [Act(0, Code.UNAVAILABLE), Act(silent=True)], []
    with pytest.raises(ServiceError, match=r"DEADLINE_EXCEEDED.*timeout_s is 0.5"):
        ask(address, streamed, [], timeout_s=0.5)
    assert len(server.timeouts_s) == 2
    wait_until(lambda: server.cancelled == 1)


@both
@whole_and_streamed
def test_proxies_of_the_environment_are_not_used(ask, streamed: bool, server: Scripted, address: str, dead_proxies):
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):  # gRPC by itself would use them
        TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=20)
    assert ask(address, streamed, [], retries=0).text == TEXT


@both
def test_an_address_without_a_service_is_unavailable(ask):
    with pytest.raises(ServiceError, match=r"UNAVAILABLE.*localhost:1") as caught:
        ask("localhost:1", False, [], retries=0)
    assert caught.value.code is Code.UNAVAILABLE


def test_a_silent_connection_ends_before_the_deadline(server: Scripted, running: tuple[Scripted, int], monkeypatch):
    """The client's pings notice a peer that sends nothing, not even a status."""
    shorter = tuple((name, 1000 if value == 5000 else value) for name, value in connection.CHANNEL_OPTIONS)
    monkeypatch.setattr(connection, "CHANNEL_OPTIONS", shorter)

    def outcome(ask: Callable, port: int) -> Code:
        with pytest.raises(ServiceError) as caught:
            ask(f"127.0.0.1:{port}", True, [], retries=0, timeout_s=60)
        return caught.value.code

    server.acts = [Act(silent=True)]
    with (
        forwarder(running[1]) as (forward, port),
        socket.create_server(("127.0.0.1", 0)) as mute,  # accepts connections and sends nothing
        ThreadPoolExecutor(3) as pool,
    ):
        outcomes = [pool.submit(outcome, ask, port) for ask in (ask_plain, ask_async)]
        outcomes.append(pool.submit(outcome, ask_plain, mute.getsockname()[1]))
        wait_until(lambda: len(server.timeouts_s) == 2)
        forward.blocked = True
        assert [future.result() for future in outcomes] == [Code.UNAVAILABLE] * 3


@given(inner=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=50))
def test_whitespace_around_a_key_does_not_count(inner: str):
    for space in ("\n", " \r\n", "\t"):
        sent = dict(Client("localhost:1", api_key=f"{space}{inner}{space}")._metadata)
        assert sent["authorization"] == f"Bearer {inner}"


@pytest.mark.parametrize("bad", ["sec ret", "sec\nret", "secrét", "sec\x7fret", "s" * 5000])
def test_a_key_that_a_header_cannot_carry_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="api_key must") as argument:
        Client("localhost:1", api_key=bad)
    monkeypatch.setenv("TINYLM_API_KEY", bad)
    with pytest.raises(ValueError, match="TINYLM_API_KEY must") as variable:
        Client("localhost:1")
    assert bad not in f"{argument.value} {variable.value}"


@pytest.mark.parametrize("api_key", [None, "", " \n"])
def test_a_blank_key_counts_as_none(api_key: str | None, monkeypatch):
    monkeypatch.setenv("TINYLM_API_KEY", " from-the-environment\n")
    assert dict(Client("localhost:1", api_key=api_key)._metadata)["authorization"] == "Bearer from-the-environment"
    monkeypatch.setenv("TINYLM_API_KEY", "\n")
    assert "authorization" not in dict(Client("localhost:1", api_key=api_key)._metadata)


@both
@pytest.mark.parametrize("timeout_s", [None, float("inf"), 1e10, 1e300])
def test_a_timeout_above_grpc_s_limit_is_no_limit(ask, timeout_s: float | None, server: Scripted, address: str):
    assert ask(address, False, [], timeout_s=timeout_s).text == TEXT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("timeout_s", value) for value in (float("nan"), 0, -1, float("-inf"), "60")],
        *[("retries", value) for value in (-1, 1.5, None)],
        *[("address", value) for value in ("", "local host:9000", "localhost:9000\n", None)],
    ],
)
def test_a_client_refuses_a_bad_setting(field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        Client(**{field: value})


def test_importing_the_package_imports_neither_engine_nor_grpc():
    code = "import sys, tinylm; print(sorted({'grpc', 'numpy', 'numba'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert [name for name in tinylm.__all__ if not hasattr(tinylm, name)] == []
    with pytest.raises(AttributeError, match="Clyent"):
        _ = tinylm.Clyent

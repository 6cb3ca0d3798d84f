"""A scripted server for the tests of both clients."""

from collections.abc import Iterator

import pytest
from helpers.client import Act, Scripted, scripted_server


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

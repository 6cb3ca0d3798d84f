"""How the callers reach a server."""

from __future__ import annotations

import asyncio

from helpers.client import ANSWER, scripted_server
from helpers.http import json_server

from loadtest import measured_server
from loadtest.generator.call_record import CallRecord
from loadtest.generator.caller import connect
from loadtest.generator.workload import Workload
from loadtest.load import Load, Mix


def called(load: Load) -> CallRecord:
    """Return the record of one call."""

    async def call() -> CallRecord:
        record = CallRecord(0, 4, 0.0, 0.0)
        caller = await connect(load)
        try:
            await caller.ask(Workload(load)[0], record, 0)
        finally:
            await caller.close()
        return record

    return asyncio.run(call())


def test_grpc_uses_no_proxy_of_the_environment(dead_proxies: None) -> None:
    with scripted_server() as (_, port):
        for stream in (False, True):
            load = Load(f"127.0.0.1:{port}", Mix.parse("4", "n"), 1, stream=stream)
            record = called(load)
            assert (record.status, len(record.text_at)) == ("OK", len(ANSWER) if stream else 0)
        assert measured_server.facts(load)["name"] == "as told"


def test_http_uses_no_proxy_of_the_environment(dead_proxies: None) -> None:
    with json_server({"usage": {"completion_tokens": 4, "prompt_tokens": 2}}) as (url, accepted):
        record = called(Load(url, Mix.parse("4", "n"), 1))
    assert (record.status, record.tokens) == ("OK", 4)
    assert [method for method, _ in accepted] == ["POST"]

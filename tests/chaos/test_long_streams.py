"""Streams that last for more than a minute, while replicas come, go, die and are replaced. HAProxy reloads each time.

Every engine pauses after each step, see `helpers.slow_engine`.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path

import pytest
import yaml
from helpers import slow_engine
from helpers.service import ROOT, Service, running_service
from ray_cluster import wait_until

from tinylm import LLM, SamplingParams
from tinylm.client import RETRIED, Client, ServiceError

pytestmark = pytest.mark.chaos

GREEDY = SamplingParams(max_tokens=230, temperature=0, ignore_eos=True)
STREAM_S = 65  # the least time of the first streams
DRAIN_S = 15  # longer than Serve's own checks of a draining replica
LIMIT_S = 500  # longer than any of them
CHANGE_LIMIT_S = 120
FIRST, SECOND = 16, 12  # streams before the first change, and with five replicas

Outcome = tuple[str, str | None]  # the text that came, and why the stream was cut; None if it is complete


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long-streams")


@pytest.fixture
def slow_while(directory: Path) -> Path:
    """Return the file that keeps the engines slow."""
    path = directory / "slow"
    path.touch()
    return path


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Service]:
    """Serve configs/serve.yaml with slow engines, and with enough time for a replica to finish its streams."""
    values = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    variables = values["controller_options"]["runtime_env"]["env_vars"]
    variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "helpers.slow_engine.begin"
    values["applications"][0]["deployments"][0]["graceful_shutdown_timeout_s"] = LIMIT_S
    config = directory / "slow.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "TINYLM_HAPROXY_SLOTS": "0",  # every replica gets streams, not only as many as there are cores
        slow_engine.FILE: str(directory / "slow"),
    }
    with running_service(config, directory, **environment) as service:
        service.wait_until_healthy(CHANGE_LIMIT_S)
        yield service


def test_streams_survive_reloads_and_end_with_their_replica(
    service: Service, stories: LLM, slow_while: Path, tmp_path: Path
) -> None:
    prompts = [f"Story number {number}:" for number in range(FIRST + SECOND)]
    expected = [answer.text for answer in stories.generate(prompts, GREEDY)]

    with streaming(service, slow_while) as begin, Client(service.address, retries=0) as client:
        began_at, first = time.monotonic(), service.replicas()
        streams = begin(prompts[:FIRST])

        change(service, tmp_path, replicas=5)
        wait_until(lambda: client.info().replica not in first, "HAProxy uses the fifth replica", CHANGE_LIMIT_S)
        streams += begin(prompts[FIRST:])
        held = running(service)
        assert len(held) == 5
        assert min(held.values()) > 0, held

        change(service, tmp_path, replicas=4)
        wait_until(lambda: len(service.replicas()) == 4, "one replica drains", CHANGE_LIMIT_S)
        victim, process = next(iter(service.replicas().items()))
        service.mark.signal(signal.SIGKILL, [process])
        wait_until(lambda: len(ended(streams)) >= held[victim], "its streams end", CHANGE_LIMIT_S)
        wait_until(lambda: len(service.replicas().keys() - held) == 1, "another replica runs", CHANGE_LIMIT_S)
        time.sleep(max(0.0, began_at + STREAM_S - time.monotonic()))
        assert len(ended(streams)) == held[victim], (held, victim, ended(streams))
        slow_while.unlink()
        outcomes = [stream.result() for stream in streams]

    cut = {number: why for number, (_, why) in enumerate(outcomes) if why is not None}
    assert len(cut) == held[victim], (held, victim, cut)
    assert set(cut.values()) <= {"IncompleteRead", *(code.name for code in RETRIED)}
    for number, (text, _) in enumerate(outcomes):
        assert expected[number].startswith(text) if number in cut else text == expected[number]


def test_a_rollout_waits_for_the_streams_of_each_replica(
    service: Service, stories: LLM, slow_while: Path, tmp_path: Path
) -> None:
    prompts = [f"Story number {number}:" for number in range(FIRST)]
    expected = [answer.text for answer in stories.generate(prompts, GREEDY)]
    with streaming(service, slow_while) as begin:
        streams, before = begin(prompts), service.replicas().keys()
        change(service, tmp_path, replicas=4, max_waiting=65)
        wait_until(lambda: len(before & service.replicas().keys()) == 3, "the first replica drains", CHANGE_LIMIT_S)
        time.sleep(DRAIN_S)
        assert not any(stream.done() for stream in streams)
        slow_while.unlink()
        assert [stream.result() for stream in streams] == [(text, None) for text in expected]
        wait_until(lambda: len(service.replicas().keys() - before) == 4, "the rollout is complete", CHANGE_LIMIT_S)


def change(service: Service, directory: Path, replicas: int, **arguments: int) -> None:
    """Deploy the config with this number of replicas, and with these arguments of the application."""
    values = yaml.safe_load(service.config.read_text(encoding="utf-8"))
    (application,) = values["applications"]
    application["args"] |= arguments
    application["deployments"][0]["num_replicas"] = replicas
    path = directory / "changed.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    service.deploy(path)


@contextmanager
def streaming(service: Service, slow_while: Path) -> Iterator[Callable[[list[str]], list[Future[Outcome]]]]:
    """Yield a function that begins a stream for each prompt, half of them over HTTP, and waits for their first text."""
    arrived: set[str] = set()  # the prompts of the streams that have text
    with (
        ThreadPoolExecutor(FIRST + SECOND) as pool,
        Client(service.address, retries=0, timeout_s=LIMIT_S) as client,  # one connection for all streams over gRPC
    ):

        def begin(prompts: list[str]) -> list[Future[Outcome]]:
            sources = [partial(pieces_grpc, client), partial(pieces_http, service.http_port)]
            begun = [pool.submit(read, sources[n % 2], prompt, arrived) for n, prompt in enumerate(prompts)]
            wait_until(lambda: bool(ended(begun)) or arrived >= set(prompts), "every stream has text", CHANGE_LIMIT_S)
            assert ended(begun) == {}
            return begun

        try:
            yield begin
        finally:
            slow_while.unlink(missing_ok=True)


def ended(streams: list[Future[Outcome]]) -> dict[int, Outcome]:
    """Return the outcomes of the streams that have ended, by their places in the list."""
    return {number: stream.result() for number, stream in enumerate(streams) if stream.done()}


def running(service: Service) -> dict[str, int]:
    """Return the number of streams that each replica generates now."""
    with closing(HTTPConnection("localhost", service.http_port, timeout=LIMIT_S)) as connection:
        connection.request("GET", "/live")
        replicas = json.load(connection.getresponse())["replicas"]
    return {replica["id"]: replica["running"] for replica in replicas}


def read(source: Callable[[str], Iterator[str]], prompt: str, arrived: set[str]) -> Outcome:
    """Read a stream to its end. Add its prompt to `arrived` when it has text."""
    text = ""
    try:
        for piece in source(prompt):
            text += piece
            arrived.add(prompt)
    except ServiceError as error:
        return text, error.code.name
    except IncompleteRead:  # the connection was closed before the end of the body
        return text, "IncompleteRead"
    return text, None


def pieces_grpc(client: Client, prompt: str) -> Iterator[str]:
    yield from client.stream(prompt, GREEDY)


def pieces_http(port: int, prompt: str) -> Iterator[str]:
    fields = {"prompt": prompt, "max_tokens": GREEDY.max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with closing(HTTPConnection("localhost", port, timeout=LIMIT_S)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(fields), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        unfinished = b""
        while part := response.read1():
            *events, unfinished = (unfinished + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                yield json.loads(data)["choices"][0]["text"]
    pytest.fail("the body is complete, but without [DONE]")

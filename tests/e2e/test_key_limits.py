"""Limits of keys in a service of two replicas, over both protocols and behind both proxies."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import openai
import psutil
import pytest
import yaml
from google.rpc import error_details_pb2, status_pb2
from helpers.service import Service, running_service

from tinylm import SamplingParams
from tinylm.client import METADATA, Client, ServiceError
from tinylm.client.wire import STATUS_DETAILS, request_from_params
from tinylm.serving.keys import add_key
from tinylm.serving.ray import haproxy
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

SHORT = SamplingParams(max_tokens=2, temperature=0)
SHORT_REQUEST = request_from_params("Once", SHORT)
GIVE_UP_S = 60
LIMITS = {
    "free": {"priority": 3},
    "few_calls": {"requests_per_minute": 5},
    "few_http_calls": {"requests_per_minute": 3},
    "few_tokens": {"tokens_per_minute": 200},
}


@pytest.fixture(scope="module", params=["serve.yaml", "serve-python-proxy.yaml"])
def running(request, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """Yield the service and the key of each name."""
    directory = tmp_path_factory.mktemp("limits")
    keys = {name: add_key(directory / "keys.txt", name, **fields) for name, fields in LIMITS.items()}
    values = yaml.safe_load(Path("configs", request.param).read_text(encoding="utf-8"))
    (application,) = values["applications"]
    application["args"] |= {"api_keys": str(directory / "keys.txt")}
    application["deployments"][0]["num_replicas"] = 2
    config = directory / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    with running_service(config, directory) as service:
        yield service, keys


def n_counters(service: Service) -> int:
    """Return the number of processes that count for all replicas."""
    titles = []
    for pid in service.mark.processes():
        with suppress(psutil.Error):
            titles.append(" ".join(psutil.Process(pid).cmdline()))
    return sum("RateLimiter" in title for title in titles)


def refusal_of(error: grpc.RpcError) -> tuple[str, float]:
    """Return the message of a refusal by a limit, and the seconds to wait."""
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(error.trailing_metadata())
    assert haproxy.FULL not in metadata  # otherwise HAProxy would refuse the calls of all keys
    status, info = status_pb2.Status.FromString(metadata[STATUS_DETAILS]), error_details_pb2.RetryInfo()
    assert (status.code, status.message) == (8, error.details())
    assert status.details[0].Unpack(info)
    return error.details(), info.retry_delay.ToNanoseconds() / 1e9


def is_admitted(client: Client, params: SamplingParams | None = None) -> bool:
    """Return whether the service answers a call. Raise every error that is not the refusal of a limit."""
    try:
        return client.generate("Once", params or SHORT).n_tokens <= 2
    except ServiceError as error:
        if error.retry_after_s is None:
            raise
        return False


def test_limits_hold_over_all_replicas(running) -> None:
    service, keys = running
    with Client(service.address, api_key=keys["free"], retries=0) as client:
        for _ in range(3):
            assert client.generate("Once", SHORT).n_tokens == 2
    assert n_counters(service) == 0  # a key without limits asks nobody

    metadata = (*METADATA, ("authorization", f"Bearer {keys['few_calls']}"))
    outcomes: Counter[str] = Counter()

    def call(number: int) -> None:
        with grpc.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = TinyLMStub(channel)
            try:
                if number % 2:
                    stub.Generate(SHORT_REQUEST, metadata=metadata)
                else:
                    list(stub.GenerateStream(SHORT_REQUEST, metadata=metadata))
                outcomes["OK"] += 1
            except grpc.RpcError as error:
                message, wait_s = refusal_of(error)
                assert message.startswith("the key 'few_calls' has a limit of 5 requests per minute: try again in ")
                assert 0 < wait_s <= 60
                assert message.endswith(f"{math.ceil(wait_s * 10) / 10:.1f} s")
                outcomes["refused"] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(16)))
    assert outcomes == {"OK": 5, "refused": 11}
    assert n_counters(service) == 1
    used = {line["replica"] for line in service.call_lines() if line.get("api_key_name") == "few_calls"}
    assert len(used) == 2
    with (
        Client(service.address, api_key=keys["few_calls"], timeout_s=1) as client,
        pytest.raises(ServiceError) as caught,
    ):
        client.generate("Once", SHORT)  # the time to wait is longer than its timeout
    assert caught.value.attempts == 1
    assert caught.value.retry_after_s > 1
    assert not any(key in json.dumps(service.log_lines()) for key in keys.values())


def test_http_tells_a_limit_as_openai_does(running) -> None:
    service, keys = running
    settings = {"model": "stories-8m", "prompt": "Once", "max_tokens": 2}
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{service.url}/v1", api_key=keys["few_http_calls"], max_retries=0, http_client=http
    ) as client:
        client.completions.create(**settings, n=2)  # one call, whatever its number of answers
        for stream in (False, True):
            list(client.completions.create(**settings, stream=stream))
        client.models.list()  # only calls that generate text count
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(**settings, stream=stream)
            error = refused.value
            assert (error.type, error.code, error.param) == ("requests", "rate_limit_exceeded", None)
            assert "the key 'few_http_calls' has a limit of 3 requests per minute" in error.message
            assert 1 <= int(error.response.headers["retry-after"]) <= 60


def test_unused_tokens_are_given_back(running) -> None:
    service, keys = running
    with Client(service.address, api_key=keys["few_tokens"], retries=0) as client:
        with pytest.raises(ValueError, match=r"max_tokens is 250: .* 'few_tokens' may use at most 200 per minute"):
            client.generate("Once", SamplingParams(max_tokens=250))
        for _ in range(3):  # each asks for 190 tokens and ends at the first space
            deadline = time.monotonic() + GIVE_UP_S
            while not is_admitted(client, SamplingParams(max_tokens=190, stop=(" ",))):
                assert time.monotonic() < deadline
        client.generate("Once", SamplingParams(max_tokens=150, ignore_eos=True))
        with pytest.raises(ServiceError, match="limit of 200 tokens per minute"):
            client.generate("Once", SamplingParams(max_tokens=100))


def test_the_service_survives_the_death_of_the_counter(running) -> None:
    service, keys = running
    (counter,) = (
        process
        for process in map(psutil.Process, service.mark.processes())
        if "RateLimiter" in " ".join(process.cmdline())
    )
    counter.kill()
    with Client(service.address, api_key=keys["few_calls"], retries=0) as client:
        answered = 0
        while is_admitted(client):
            answered += 1
    # The first call can find the old counter, each replica can count alone, and then the next counter begins.
    assert answered <= 3 * LIMITS["few_calls"]["requests_per_minute"]


def test_an_answer_beside_a_refused_key_is_not_refused(running) -> None:
    """The refusals of one key must not make the proxy refuse the calls of others."""
    service, keys = running
    with (
        Client(service.address, api_key=keys["few_calls"], retries=0) as limited,
        Client(service.address, api_key=keys["free"], retries=0) as free,
    ):
        for _ in range(20):
            is_admitted(limited)
            assert free.generate("Once", SHORT).n_tokens == 2


def test_tokenize_is_not_limited(running) -> None:
    service, keys = running
    with Client(service.address, api_key=keys["few_calls"], retries=0) as client:
        for _ in range(10):
            assert client.tokenize("Once")
            assert isinstance(client.info(), pb.GetModelInfoResponse)

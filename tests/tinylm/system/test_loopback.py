"""Requests to this machine beside proxies that do not answer."""

import os
import urllib.error
import urllib.request

import grpc
import pytest
import requests
from helpers.client import scripted_server
from helpers.http import json_server

from tinylm.system.proxies import DIRECT, without_proxy_for_loopback
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub


def test_direct_requests_use_no_proxy(dead_proxies: None) -> None:
    with json_server(1) as (url, _):
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=20)
        with DIRECT.open(url, timeout=20) as response:
            assert response.read() == b"1"


def test_the_variables_exempt_this_machine(dead_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib, requests and gRPC read them. OpenTelemetry's exporters use the last two."""
    for name, value in without_proxy_for_loopback(os.environ).items():
        monkeypatch.setenv(name, value)
    with json_server(1) as (url, _):
        with urllib.request.urlopen(url, timeout=20) as response:
            assert response.read() == b"1"
        assert requests.get(url, timeout=20).json() == 1
    with scripted_server() as (_, port), grpc.insecure_channel(f"localhost:{port}") as channel:
        assert TinyLMStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=20).name


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": " .example.org ,localhost,"}, ".example.org,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "example.org"}, "example.org,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_hosts_that_the_environment_exempts_stay_exempt(environment: dict[str, str], hosts: str) -> None:
    assert without_proxy_for_loopback(environment) == {"no_proxy": hosts, "NO_PROXY": hosts}

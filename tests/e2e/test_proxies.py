"""What callers get through each of the two proxies, HAProxy and Serve's Python proxy: the same answers and errors."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from helpers import fault_actions
from helpers.service import Service
from openai import DefaultHttpxClient

from tinylm import LLM, SamplingParams
from tinylm.client import METADATA, Client
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

LIMIT_S = 30
SLACK_MS = 100  # time for the replica to learn that a client left; a whole answer takes several times that
GREEDY = SamplingParams(max_tokens=24, temperature=0)
PROMPT = "Once upon a time"
PROMPTS = [PROMPT, "The little dog", '"Hello," said the bear.', "", "It was raining, and Tom was sad."]


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Iterator[Service]:
    """The service of each config. Its replicas must still be the same after all tests."""
    shared_service.wait_until_healthy(LIMIT_S)
    before = shared_service.replicas()
    yield shared_service
    # The Python proxy avoids a replica for up to 10 s while it believes an old count of its calls.
    shared_service.wait_until_healthy(LIMIT_S)
    assert shared_service.replicas() == before


@pytest.fixture
def stub(service: Service) -> Iterator[TinyLMStub]:
    with grpc.insecure_channel(service.address) as channel:
        yield TinyLMStub(channel)


def test_concurrent_clients_get_the_text_of_the_library(service: Service, stories: LLM) -> None:
    expected = {prompt: stories.generate(prompt, GREEDY)[0] for prompt in PROMPTS}

    def ask(prompt: str) -> None:
        with Client(service.address, retries=0) as client:
            whole = client.generate(prompt, GREEDY)
            stream = client.stream(prompt, GREEDY)
            text = "".join(stream)
        assert whole.text == stream.completion.text == text == expected[prompt].text
        for answer in (whole, stream.completion):
            assert answer.finish_reason == expected[prompt].finish_reason
            assert answer.n_tokens == len(expected[prompt].token_ids)
            assert answer.n_prompt_tokens == expected[prompt].n_prompt_tokens

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, PROMPTS * 4))


def test_a_stream_arrives_in_pieces(service: Service, stub: TinyLMStub, http: DefaultHttpxClient) -> None:
    # The service looks for a stop string every 5 ms. Without one, it sends every 40 ms, the time of 100 tokens.
    fields = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stop": ["never generated"]}
    messages = list(stub.GenerateStream(pb.GenerateRequest(**fields), metadata=METADATA))
    text = stub.Generate(pb.GenerateRequest(**fields), metadata=METADATA).text
    assert messages[0].tokens < 100
    assert sum(message.tokens for message in messages) == messages[-1].usage.completion_tokens == 100
    assert "".join(message.text for message in messages) == text
    assert {message.finish_reason for message in messages[:-1]} == {pb.FINISH_REASON_UNSPECIFIED}
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert 0 <= messages[-1].timings.first_token_ms <= messages[-1].timings.total_ms

    response = http.post(f"{service.url}/v1/completions", json={**fields, "stream": True})
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{response.headers['x-request-id']}"}
    assert "".join(pieces) == text
    assert 0 < len(pieces[0]) < len(text)


@pytest.mark.parametrize(
    ("fields", "code", "status", "words"),
    [
        ({"temperature": -1}, grpc.StatusCode.INVALID_ARGUMENT, 400, ["temperature", "-1", "0 to 10"]),
        ({"prompt": "word " * 300}, grpc.StatusCode.INVALID_ARGUMENT, 400, ["prompt", "255", "256"]),
        ({"prompt": "a" * 100_000}, grpc.StatusCode.INVALID_ARGUMENT, 400, ["prompt", "100000", "65536"]),
        ({"max_tokens": 250, "timeout_ms": 5}, grpc.StatusCode.DEADLINE_EXCEEDED, 504, ["timeout_ms is 5"]),
    ],
    ids=["temperature", "tokens", "bytes", "timeout"],
)
def test_errors_have_a_status_and_name_the_field(
    service: Service,
    stub: TinyLMStub,
    http: DefaultHttpxClient,
    fields: dict,
    code: grpc.StatusCode,
    status: int,
    words: list[str],
) -> None:
    fields = {"prompt": "Once", "temperature": 0, **fields}
    messages = []
    for call in (stub.Generate, lambda *a, **k: list(stub.GenerateStream(*a, **k))):
        if call is stub.Generate or code is grpc.StatusCode.INVALID_ARGUMENT:
            with pytest.raises(grpc.RpcError) as caught:
                call(pb.GenerateRequest(**fields), metadata=METADATA)
            assert caught.value.code() == code
            messages.append(caught.value.details())
    response = http.post(f"{service.url}/v1/completions", json=fields)
    assert response.status_code == status
    for message in (*messages, response.json()["error"]["message"]):
        assert [word for word in words if word not in message] == []
        assert "Traceback" not in message


def test_standard_services_answer_without_a_key(service: Service) -> None:
    """Health lists every service, and reflection has both of its names."""
    services = {"tinylm.v1.TinyLM", "grpc.health.v1.Health"}
    with grpc.insecure_channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        listed = health.List(health_pb2.HealthListRequest(), metadata=METADATA, timeout=LIMIT_S).statuses
        assert {name: status.status for name, status in listed.items()} == dict.fromkeys(
            ("", "tinylm.v1.TinyLM"), health_pb2.HealthCheckResponse.SERVING
        )
        for version in ("v1", "v1alpha"):
            name = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            reflect = channel.stream_stream(
                name,
                reflection_pb2.ServerReflectionRequest.SerializeToString,
                reflection_pb2.ServerReflectionResponse.FromString,
            )
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflect(iter([request]), timeout=LIMIT_S)
            assert services < {found.name for found in answer.list_services_response.service}
        unknown = channel.unary_unary("/tinylm.v1.TinyLM/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"", metadata=METADATA, timeout=LIMIT_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_time_limit_ends_a_stream_with_its_text(service: Service, stub: TinyLMStub, http: DefaultHttpxClient) -> None:
    fields = {"prompt": "Once", "max_tokens": 250, "timeout_ms": 5, "temperature": 0}
    last = list(stub.GenerateStream(pb.GenerateRequest(**fields), metadata=METADATA))[-1]
    assert last.finish_reason == pb.FINISH_REASON_TIMEOUT
    assert last.usage.completion_tokens < 250
    response = http.post(f"{service.url}/v1/completions", json={**fields, "stream": True})
    assert response.status_code == 200
    last_event = response.text.split("\n\n")[-3].removeprefix("data: ")
    assert json.loads(last_event)["choices"][0]["finish_reason"] == "timeout"


def test_long_headers_and_frequent_pings_are_accepted(service: Service) -> None:
    headers = (*METADATA, ("x-long", "a" * 40_000), *((f"x-{number}", "a") for number in range(300)))
    pings = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.min_ping_interval_without_data_ms", 1000)]
    fields = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    with grpc.insecure_channel(service.address, options=pings) as channel:
        stub = TinyLMStub(channel)
        held = stub.GenerateStream(pb.GenerateRequest(**{**fields, "max_tokens": 250}), metadata=METADATA)
        next(held)
        for _ in range(5):
            assert stub.Generate(pb.GenerateRequest(**fields), metadata=headers, timeout=LIMIT_S).text
        assert list(held)[-1].usage.completion_tokens > 2
        time.sleep(5)  # several pings, without data
        assert stub.Generate(pb.GenerateRequest(**fields), metadata=METADATA, timeout=LIMIT_S).text


def test_many_cancellations_leave_the_service_healthy(service: Service) -> None:
    assert fault_actions.cancel(service.address, 100) == {"CANCELLED": 100}
    service.wait_until_healthy(LIMIT_S)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_http_client_that_leaves_frees_its_slots(service: Service, stream: bool) -> None:
    """Sixteen answers fill a replica. An answer generated for nobody would end later than its client left."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 250, "n": 16, "temperature": 0, "stream": stream})
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    names = [f"left-{stream}-{number}" for number in range(8)]

    def leave(name: str) -> float:
        """Return how many milliseconds the client stayed; on a busy machine that can be long."""
        came_at = time.monotonic()
        with socket.create_connection(("localhost", service.http_port), timeout=LIMIT_S) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\nx-request-id: {name}\r\n\r\n{body}".encode())
            if stream:
                assert connection.recv(4096)
            else:
                time.sleep(0.05)
        return (time.monotonic() - came_at) * 1000

    with ThreadPoolExecutor(2) as pool:
        stayed_ms = dict(zip(names, pool.map(leave, names), strict=True))
    deadline = time.monotonic() + LIMIT_S
    lines: list[dict] = []
    while len(lines) < len(names) and time.monotonic() < deadline:
        lines = [line for line in service.call_lines() if line.get("request_id") in names]
        time.sleep(0.05)
    assert sorted(line["request_id"] for line in lines) == names
    assert "CANCELLED" in {line["status"] for line in lines}
    finished = [line for line in lines if line["status"] != "CANCELLED"]  # before the client left
    assert [line for line in finished if line["total_ms"] > stayed_ms[line["request_id"]] + SLACK_MS] == []

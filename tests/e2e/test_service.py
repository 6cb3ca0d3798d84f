"""The real configs, started as `tinylm serve` starts them, asked over real gRPC: both proxies, four replicas each."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from helpers import docs_commands, fault_actions
from helpers.fault_load import FaultLoad, account
from helpers.service import PLAIN_PATH, Service
from helpers.tls import make_certificate, tls_front

from tinylm import LLM, SamplingParams
from tinylm.client import METADATA, AsyncClient, Client, ServedCompletion, ServiceError
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

SPREAD_LIMIT_S = 30
HEAL_LIMIT_S = 60
GREEDY = SamplingParams(max_tokens=24, temperature=0)
PROMPTS = ["Once upon a time", "The little dog", '"Hello," said the bear.', "", "It was raining, and Tom was sad."]


@pytest.fixture
def service(shared_service: Service) -> Service:
    return shared_service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.address, retries=0) as client:
        yield client


@pytest.fixture
def stub(service: Service) -> Iterator[TinyLMStub]:
    with grpc.insecure_channel(service.address) as channel:
        yield TinyLMStub(channel)


def drain(client: Client, prompt: str, params: SamplingParams) -> tuple[list[str], object]:
    stream = client.stream(prompt, params)
    return list(stream), stream.completion


def test_the_dashboard_opens_without_further_steps_and_shows_four_running_replicas(service: Service) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"{service.dashboard}/api/serve/applications/"
    ) as response:
        application = json.load(response)["applications"]["tinylm"]
    replicas = application["deployments"]["TinyLM"]["replicas"]
    assert application["status"] == "RUNNING"
    assert [replica["state"] for replica in replicas] == ["RUNNING"] * 4


def test_the_load_is_spread_over_all_four_replicas(client: Client) -> None:
    seen: set[str] = set()
    deadline = time.monotonic() + SPREAD_LIMIT_S  # a proxy may hear of the last replica a moment after the rest
    while len(seen) < 4 and time.monotonic() < deadline:
        seen.add(client.info().replica)
    assert len(seen) == 4


def test_concurrent_clients_get_the_text_that_the_library_gives_whole_and_streamed(
    service: Service, stories: LLM
) -> None:
    expected = {prompt: stories.generate(prompt, GREEDY)[0] for prompt in PROMPTS}

    def ask(prompt: str) -> None:
        with Client(service.address, retries=0) as own:
            whole = own.generate(prompt, GREEDY)
            pieces, streamed = drain(own, prompt, GREEDY)
        assert whole.text == streamed.text == "".join(pieces) == expected[prompt].text
        assert whole.finish_reason == streamed.finish_reason == expected[prompt].finish_reason
        assert whole.n_tokens == streamed.n_tokens == len(expected[prompt].token_ids)
        assert whole.n_prompt_tokens == streamed.n_prompt_tokens == expected[prompt].n_prompt_tokens

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, PROMPTS * 4))


def test_what_the_docs_say_to_ask_a_service_is_answered(service: Service, tmp_path: Path) -> None:
    """Commands and examples of README.md and docs/*.md that ask localhost; load tests with less time."""
    if service.config.name != "serve.yaml":
        pytest.skip("once is enough: clients can't tell the proxies apart")

    def here(text: str) -> str:
        text = text.replace("localhost:9000", service.address)
        return text.replace("localhost:8000", f"localhost:{service.http_port}")

    def follow(page: str) -> None:
        """One after the other: a page's commands may read what those before have written."""
        directory = docs_commands.make_workplace(tmp_path / page.replace("/", "-"))
        for command in docs_commands.commands():
            if command.page == page and docs_commands.is_for_a_service(command):
                text = here(docs_commands.filled(command.text, docs_commands.executed_by(command)))
                if re.fullmatch(r"python -m loadtest( -.*)?", text):
                    text += " --duration 0.5 --warmup 0"
                    text += "" if "--server" in text else f" --server {service.address}"
                docs_commands.run(text, directory)
        for of_page, source in docs_commands.programs():
            if of_page == page and docs_commands.needs_service(source):
                assert docs_commands.run([sys.executable, "-c", here(source)], directory).strip()

    asking = [command.page for command in docs_commands.commands() if docs_commands.is_for_a_service(command)]
    asking += [page for page, source in docs_commands.programs() if docs_commands.needs_service(source)]
    assert len(asking) > 10
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, dict.fromkeys(asking)))


def test_sampled_text_follows_its_seed_and_settings(client: Client, stories: LLM) -> None:
    params = SamplingParams(
        max_tokens=40, temperature=1.1, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=7,
        stop=("zz", "."), logprobs=3,
    )  # fmt: skip
    expected = stories.generate("Once upon a time", params)[0]
    whole = client.generate("Once upon a time", params)
    pieces, streamed = drain(client, "Once upon a time", params)
    assert whole.text == streamed.text == "".join(pieces) == expected.text
    assert "." not in whole.text
    assert whole.n_tokens == streamed.n_tokens == len(expected.token_ids)
    for given in (whole.logprobs, streamed.logprobs):
        assert [entry.logprob for entry in given] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
        assert [len(entry.top) for entry in given] == [3] * len(expected.token_ids)


def test_a_stream_comes_in_pieces_and_only_its_last_message_ends_it(stub: TinyLMStub) -> None:
    # With a stop string to look out for, messages come every 5 ms instead of 40, which is as long as 100 tokens take.
    request = pb.GenerateRequest(prompt="Once upon a time", max_tokens=100, temperature=0, stop=["never said"])
    messages = list(stub.GenerateStream(request, metadata=METADATA))
    assert messages[0].tokens < 100  # how many fewer is a matter of how busy the machine is
    assert sum(message.tokens for message in messages) == 100
    assert "".join(message.text for message in messages) == stub.Generate(request, metadata=METADATA).text
    assert [message.finish_reason for message in messages[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(messages) - 1)
    assert messages[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert messages[-1].usage.completion_tokens == 100
    assert 0 <= messages[-1].timings.first_token_ms <= messages[-1].timings.total_ms


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1}, ["temperature", "-1", "0 to 10"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_p": 0}, ["top_p", "above 0"]),
        ({"min_p": 2}, ["min_p", "0 to 1"]),
        ({"max_tokens": 0}, ["max_tokens", "at least 1"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "0.01 to 10"]),
        ({"seed": 2**64 - 1}, ["seed", str(2**63 - 1)]),
        ({"logprobs": 21}, ["logprobs", "21", "0 to 20"]),
        ({"stop": [""]}, ["stop", "1 to 256"]),
        ({"stop": ["a"] * 17}, ["stop", "17", "16"]),
        ({"prompt": "word " * 300}, ["prompt", "255", "256"]),
        ({"prompt": "a" * 100_000}, ["prompt", "100000", "65536"]),
    ],
)
def test_a_bad_request_is_told_field_value_and_limit(stub: TinyLMStub, fields: dict, named: list[str]) -> None:
    request = pb.GenerateRequest(**{"prompt": "Once", **fields})
    for call in (stub.Generate, lambda *a, **k: list(stub.GenerateStream(*a, **k))):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, metadata=METADATA)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert [word for word in named if word not in caught.value.details()] == []
        assert "Traceback" not in caught.value.details()


def test_a_time_limit_ends_a_whole_answer_with_a_status_and_a_stream_with_the_text_so_far(stub: TinyLMStub) -> None:
    request = pb.GenerateRequest(prompt="Once", max_tokens=250, timeout_ms=5, seed=0, temperature=0)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request, metadata=METADATA)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "timeout_ms is 5" in caught.value.details()
    last = list(stub.GenerateStream(request, metadata=METADATA))[-1]
    assert last.finish_reason == pb.FINISH_REASON_TIMEOUT
    assert last.usage.completion_tokens < 250


def test_the_client_raises_what_a_caller_can_act_on(service: Service, client: Client) -> None:
    with pytest.raises(ValueError, match="prompt has"):
        client.generate("word " * 300)
    with pytest.raises(ValueError, match="prompt has"):
        list(client.stream("word " * 300))
    with Client("localhost:1", retries=0) as nobody, pytest.raises(ServiceError, match="UNAVAILABLE"):
        nobody.info()


def test_the_asynchronous_client_gives_what_the_plain_one_does_also_in_many_streams_at_once(
    service: Service, client: Client
) -> None:
    settings = [SamplingParams(max_tokens=24, seed=seed, logprobs=1) for seed in range(32)]
    expected = [client.generate("Once upon a time", params) for params in settings]

    async def one(asking: AsyncClient, params: SamplingParams) -> tuple[str, ServedCompletion]:
        stream = asking.stream("Once upon a time", params)
        text = "".join([piece async for piece in stream])
        return text, stream.completion

    async def all_at_once() -> None:
        async with AsyncClient(service.address, retries=0) as asking:
            streamed = await asyncio.gather(*(one(asking, params) for params in settings))
            whole = await asyncio.gather(*(asking.generate("Once upon a time", params) for params in settings))
            assert (await asking.info()).name == "stories-8m"
            assert await asking.tokenize("a cat") == client.tokenize("a cat")
            with pytest.raises(ValueError, match="prompt has"):
                await asking.generate("word " * 300)
        for (text, completion), other, ours in zip(streamed, whole, expected, strict=True):
            assert text == completion.text == other.text == ours.text
            for answer in (completion, other):
                assert (answer.finish_reason, answer.n_tokens) == (ours.finish_reason, ours.n_tokens)
                assert len(answer.logprobs) == ours.n_tokens
                assert [e.logprob for e in answer.logprobs] == pytest.approx(
                    [e.logprob for e in ours.logprobs], abs=1e-3
                )

    asyncio.run(all_at_once())


def test_the_story_prompt_writes_by_the_service(service: Service, client: Client, tmp_path: Path) -> None:
    story = "Once upon a time" + client.generate("Once upon a time", GREEDY).text
    story += client.generate(story, GREEDY).text
    command = [sys.executable, "-m", "tinylm.cli", "write", "--server", service.address, "-t", "0", "-n", "24"]
    done = subprocess.run(command, input="Once upon a time\n\n", capture_output=True, text=True, check=True)
    assert done.stdout == story.removesuffix("\n") + "\n"


def test_a_client_may_name_several_proxies(service: Service, client: Client) -> None:
    """HAProxy refuses a host's name with a comma, which gRPC would make of them."""
    port = service.address.rpartition(":")[2]
    with Client(f"ipv4:127.0.0.1:1,127.0.0.1:{port}", retries=0) as several:
        assert several.info().name == client.info().name


def test_a_cancelled_stream_leaves_the_service_answering(client: Client) -> None:
    for _ in range(20):
        stream = client.stream("Once upon a time", SamplingParams(max_tokens=200))
        next(stream)
        stream.close()
    assert client.generate("Once upon a time", GREEDY).n_tokens == GREEDY.max_tokens


def test_tokens_and_model_are_the_library_s(client: Client, stories: LLM) -> None:
    text = "Zoë said: \u2581 “hello” 🎉\n"
    tokens = client.tokenize(text)
    assert [token for token, _ in tokens] == stories.tokenizer.encode(text)
    assert b"".join(piece for _, piece in tokens).decode() == text
    info = client.info()
    assert (info.name, info.parameters, info.weights) == ("stories-8m", stories.config.n_parameters, "int8")
    assert (info.vocab_size, info.context, info.layers) == (4096, 256, 16)
    assert info.arithmetic == stories.model.arithmetic


def test_tls_in_front_of_the_service(service: Service, tmp_path: Path, stories: LLM) -> None:
    expected = stories.generate("Once upon a time", GREEDY)[0].text
    with (
        tls_front(make_certificate(tmp_path), service.grpc_port, service.http_port) as front,
        Client(front.address, tls=front.ca, retries=0) as client,
    ):
        assert client.generate("Once upon a time", GREEDY).text == expected
        assert "".join(drain(client, "Once upon a time", GREEDY)[0]) == expected
        with pytest.raises(ValueError, match="65536"):
            client.generate("a" * 90_000)


def test_reflection_shows_the_service_to_general_clients(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    assert "tinylm.v1.TinyLM" in [entry.name for entry in answer.list_services_response.service]


def test_the_command_that_the_ready_message_suggests_works(service: Service) -> None:
    """As it stands, in the shell that ran `make serve`: one that has no .venv on its path."""
    suggestion = re.search(r"try it:\s+(.*)", service.log)
    assert suggestion is not None
    result = subprocess.run(
        suggestion[1], shell=True, capture_output=True, text=True, check=True, env={**os.environ, "PATH": PLAIN_PATH}
    )
    assert result.stdout.startswith("Once upon a time")
    assert len(result.stdout) > len("Once upon a time") + 8


@pytest.mark.parametrize("mode", [[], ["--stream"]], ids=["unary", "stream"])
def test_the_load_test_counts_every_answer(service: Service, mode: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "loadtest", "--server", service.address, "--concurrency", "3", "--duration", "2"]
    subprocess.run([*command, "--warmup", "0", "-n", "8", "--output", str(output), *mode], check=True)
    (run,) = json.loads(output.read_text())["runs"]
    assert set(run["statuses"]) == {"OK"}
    assert run["statuses"]["OK"] == run["requests"] == sum(run["replicas"].values())
    assert run["requests_per_s"] == pytest.approx(run["requests"] / 2, abs=1e-3)
    assert 0 < run["latency_ms"]["p50"] <= run["latency_ms"]["p99"] <= run["latency_ms"]["max"]
    assert ("ttft_ms" in run) == bool(mode)
    assert {"replicas", "proxy"} <= set(run["server"]["by_role"])


# The short form of tests/chaos, with the default proxy. The last test replaces a replica.


@pytest.fixture
def haproxy_service(service: Service) -> Service:
    if service.config.name != "serve.yaml":
        pytest.skip("faults are tried with the default proxy")
    return service


def test_haproxy_is_told_how_many_slots_replicas_have(haproxy_service: Service) -> None:
    """By the launcher, from the config; where there are fewer cores than replicas, the first are filled so far."""
    (application,) = yaml.safe_load(haproxy_service.config.read_text(encoding="utf-8"))["applications"]
    slots, cores = application["args"]["slots"], len(os.sched_getaffinity(0))
    deadline = time.monotonic() + SPREAD_LIMIT_S  # Ray writes the config anew when it hears of another replica
    rules = ""
    while f"be_conn ge {4 * slots}\n" not in rules:
        assert time.monotonic() < deadline, rules
        time.sleep(0.1)
        with suppress(psutil.NoSuchProcess):
            arguments = psutil.Process(haproxy_service.mark.processes("haproxy")[0]).cmdline()
            rules = Path(arguments[arguments.index("-f") + 1]).read_text(encoding="utf-8")
    assert len(re.findall(rf"use-server .* lt {slots} }}", rules)) == (2 * cores if cores < 4 else 0)  # gRPC and HTTP


def test_haproxy_listens_on_loopback_alone(haproxy_service: Service) -> None:
    """With gRPC, HTTP, its metrics and its statistics."""
    (pid, *_) = haproxy_service.mark.processes("haproxy")
    found = [of.laddr for of in psutil.Process(pid).net_connections("tcp") if of.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found} == {"127.0.0.1"}
    assert len({address.port for address in found}) == 4


def test_no_request_breaks_the_service(haproxy_service: Service) -> None:
    before = haproxy_service.replicas()
    statuses = fault_actions.fuzz(haproxy_service.address)
    assert set(statuses) <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, statuses
    assert haproxy_service.replicas() == before


def test_a_storm_of_cancellations_leaves_no_work_behind(haproxy_service: Service) -> None:
    assert fault_actions.cancel(haproxy_service.address, 200) == {"CANCELLED": 200}
    assert haproxy_service.is_healthy()


def test_a_full_queue_refuses_and_forgets_nobody(haproxy_service: Service) -> None:
    statuses = fault_actions.fill_queue(haproxy_service.address, 600)
    assert set(statuses) == {"OK", "RESOURCE_EXHAUSTED"}, statuses
    assert statuses["OK"] >= 4 * 16


def test_a_replica_dies_under_load_and_nobody_s_request_is_lost(haproxy_service: Service, stories: LLM) -> None:
    expected = stories.generate("Once upon a time", GREEDY)[0].text
    with FaultLoad([haproxy_service.address], 4, "Once upon a time", expected, GREEDY.max_tokens) as load:
        victim = next(iter(haproxy_service.replicas().values()))
        fault_at = time.perf_counter()
        haproxy_service.mark.signal(signal.SIGKILL, [victim])
        haproxy_service.wait_until_healthy(HEAL_LIMIT_S, without=[victim])
    figures = account(load.requests, fault_at)
    assert figures["answered"] > 0
    assert figures["lost"] == 0, figures

"""API keys, a full queue, clients that leave or do not read, and the end of the service.

The service has one replica with two slots and the slow NumPy kernels, so that a long answer takes a while.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import openai
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.browser import chromium, visit
from helpers.service import Service, running_service
from helpers.terminal import Terminal, terminal
from playwright.sync_api import expect

from tinylm import LLM, SamplingParams
from tinylm.client import METADATA, AsyncClient, Client
from tinylm.client.wire import request_from_params
from tinylm.serving.keys import make_key
from tinylm.serving.ray import haproxy
from tinylm.v1 import tinylm_pb2 as pb
from tinylm.v1.tinylm_pb2_grpc import TinyLMStub

LONG = SamplingParams(max_tokens=250, temperature=0)
SHORT = SamplingParams(max_tokens=2, temperature=0)
PROMPT = "A prompt that no log may contain"
LONG_REQUEST = request_from_params(PROMPT, LONG)
SLOTS, WAITING = 2, 2
ORIGIN = "https://example.org"
GIVE_UP_S = 60
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def secret() -> tuple[str, str]:
    return make_key("alice")


@pytest.fixture(scope="module")
def urgent() -> tuple[str, str]:
    return make_key("urgent", priority=9)


@pytest.fixture(scope="module")
def service(
    secret: tuple[str, str], urgent: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("limits")
    (directory / "keys.txt").write_text(f"{secret[1]}\n{urgent[1]}\n")
    values = yaml.safe_load(Path("configs/serve.yaml").read_text(encoding="utf-8"))
    (application,) = values["applications"]
    limits = {"slots": SLOTS, "max_waiting": WAITING, "kernels": "numpy", "api_keys": str(directory / "keys.txt")}
    application["args"] |= {**limits, "cors_origins": [ORIGIN]}
    application["deployments"][0]["num_replicas"] = 1
    config = directory / "limits.yaml"
    config.write_text(yaml.safe_dump(values))
    with running_service(config, directory) as service:
        yield service


@pytest.fixture
def client(service: Service, secret: tuple[str, str]) -> Iterator[Client]:
    with Client(service.address, retries=0, api_key=secret[0]) as client:
        yield client


@pytest.fixture
def channel(service: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def metadata(secret: tuple[str, str]) -> tuple:
    return (*METADATA, ("authorization", f"Bearer {secret[0]}"))


@pytest.fixture(scope="module")
def full_length(stories_dir: Path) -> int:
    """Return the number of tokens of the long answer, which the model may end before the limit."""
    length = len(LLM(stories_dir, kernels="numpy").generate(PROMPT, LONG)[0].token_ids)
    assert length > 60, "the answer is too short for a client to leave during it"
    return length


# Ends the next story as a person would, when it has `count` tokens.
STOP_AT_TOKEN = """([count, way]) => {
  const story = document.getElementById("story");
  const observer = new MutationObserver(() => {
    if (story.querySelectorAll(".token").length < count) return;
    observer.disconnect();
    if (way === "click") document.getElementById("go").click();
    else document.dispatchEvent(new KeyboardEvent("keydown", { key: way }));
  });
  observer.observe(story, { childList: true });
}"""


def answers(service: Service) -> list[dict]:
    """Return the log lines of all calls that the engine accepted."""
    return [line for line in service.call_lines() if line.get("finish_reason")]


def cancelled(service: Service) -> list[dict]:
    return [line for line in answers(service) if line["finish_reason"] == "cancelled"]


def wait_for_cancelled(service: Service, n_lines: int) -> list[dict]:
    """Return the lines of cancelled calls when there are `n_lines`: the replica writes a line when a call has ended."""
    deadline = time.monotonic() + GIVE_UP_S
    while len(lines := cancelled(service)) < n_lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return lines


def health(channel: grpc.Channel, service: str = "") -> int:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def code_of(call: object) -> Code:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    assert "Traceback" not in caught.value.details()
    return caught.value.code()


def test_calls_need_a_key_and_health_checks_do_not(
    client: Client, channel: grpc.Channel, secret: tuple[str, str]
) -> None:
    assert client.generate(PROMPT, SHORT).n_tokens == 2
    stub = TinyLMStub(channel)
    calls = [
        (stub.Generate, pb.GenerateRequest(prompt=PROMPT)),
        (lambda *a, **k: list(stub.GenerateStream(*a, **k)), pb.GenerateRequest(prompt=PROMPT)),
        (stub.Tokenize, pb.TokenizeRequest(text=PROMPT)),
        (stub.GetModelInfo, pb.GetModelInfoRequest()),
    ]
    wrong = [[], [("authorization", "Bearer nonsense")], [("authorization", secret[0])], [("authorization", "Bearer ")]]
    for method, request in calls:
        for more in wrong:
            assert code_of(lambda m=method, r=request, w=more: m(r, metadata=(*METADATA, *w))) == Code.UNAUTHENTICATED
    assert health(channel) == health(channel, "tinylm.v1.TinyLM") == health_pb2.HealthCheckResponse.SERVING
    assert code_of(lambda: health(channel, "another")) == Code.NOT_FOUND
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_a_full_queue_refuses_and_leaving_makes_room(
    service: Service, client: Client, channel: grpc.Channel, metadata: tuple, full_length: int
) -> None:
    stub, n_room = TinyLMStub(channel), SLOTS + WAITING

    def all_left_in_time() -> bool:
        """Return whether all accepted calls were cancelled before one of them had its answer."""
        time.sleep(1.1 * haproxy.REMEMBERED_MS / 1000)  # until HAProxy lets the replica refuse
        before, deadline = len(answers(service)), time.monotonic() + 5
        calls = [stub.Generate.future(LONG_REQUEST, metadata=metadata) for _ in range(n_room + 4)]
        while sum(call.done() for call in calls) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        refused = [call for call in calls if call.done() and call.code() == Code.RESOURCE_EXHAUSTED]
        check = health_pb2_grpc.HealthStub(channel).Check.future(health_pb2.HealthCheckRequest(), timeout=10)
        for call in calls:
            call.cancel()
        assert check.result().status == health_pb2.HealthCheckResponse.SERVING  # a full queue does not refuse it
        assert client.generate(PROMPT, SHORT).n_tokens == 2
        assert all("limit" in call.details() for call in refused)
        while len(answers(service)) < before + n_room + 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [line for line in answers(service)[before:] if line["finish_reason"] == "cancelled"]
        assert all(line["completion_tokens"] < full_length for line in left)
        return len(refused) == 4 and len(left) == n_room

    assert any(all_left_in_time() for _ in range(10))  # an answer takes a tenth of a second


def test_a_key_with_a_priority_overtakes_waiting_calls(
    service: Service, channel: grpc.Channel, metadata: tuple, urgent: tuple[str, str]
) -> None:
    stub, urgent_metadata = TinyLMStub(channel), (*METADATA, ("authorization", f"Bearer {urgent[0]}"))

    def has_overtaken() -> bool:
        shorter = request_from_params(PROMPT, replace(LONG, max_tokens=60))
        *running, waiting = [
            stub.Generate.future(request, metadata=metadata)
            for request in [*[LONG_REQUEST] * (SLOTS - 1), shorter, LONG_REQUEST]
        ]
        first = stub.Generate(LONG_REQUEST, metadata=urgent_metadata)
        has_overtaken = not waiting.done()  # all long answers take the same time
        for call in running:
            call.result()
        return has_overtaken and waiting.result().timings.queue_ms > first.timings.queue_ms > 0

    assert any(has_overtaken() for _ in range(10))  # the urgent call can come too late


def test_above_its_limit_it_answers_and_refuses_the_rest(
    service: Service, secret: tuple[str, str], tmp_path: Path
) -> None:
    def measure(*load: str) -> dict:
        out = tmp_path / "result.json"
        command = [sys.executable, "-m", "loadtest", "--server", service.address, *load, "--output", str(out)]
        command += ["--max-tokens", "20", "--duration", "1", "--warmup", "0.3", "--quiet"]
        subprocess.run(command, check=True, timeout=GIVE_UP_S, env={**os.environ, "TINYLM_API_KEY": secret[0]})
        assert secret[0] not in out.read_text()
        (run,) = json.loads(out.read_text())["runs"]
        return run

    full = measure("--concurrency", str(SLOTS + WAITING))
    assert set(full["statuses"]) == {"OK"}
    above = measure("--rate", f"{4 * full['requests_per_s']:.0f}")
    assert set(above["statuses"]) == {"OK", "RESOURCE_EXHAUSTED"}


def test_http_has_the_same_keys_and_queue(service: Service, secret: tuple[str, str]) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=secret[0], max_retries=0, http_client=http) as client:
        assert client.completions.create(model="stories-8m", prompt=PROMPT, max_tokens=2).usage.completion_tokens == 2
        stranger = client.with_options(api_key="nonsense")
        for call in (stranger.models.list, lambda: stranger.completions.create(model="stories-8m", prompt=PROMPT)):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert (caught.value.code, caught.value.response.headers["www-authenticate"]) == (
                "invalid_api_key",
                "Bearer",
            )
        settings = {"model": "stories-8m", "prompt": PROMPT, "temperature": 0, "max_tokens": LONG.max_tokens}
        with client.completions.create(**settings, n=SLOTS, stream=True) as stream, ThreadPoolExecutor(1) as pool:
            assert next(iter(stream)).id
            pool.submit(client.completions.create, **settings, n=WAITING)
            authorization = {"authorization": f"Bearer {secret[0]}"}
            while http.get(f"{service.url}/live", headers=authorization).json()["replicas"][0]["waiting"] < WAITING:
                time.sleep(0.05)
            for stream_too in (False, True):
                with pytest.raises(openai.RateLimitError) as refused:
                    client.completions.create(**settings, stream=stream_too)
                assert refused.value.code == "queue_full"
                assert int(refused.value.response.headers["retry-after"]) >= 1
            assert http.get(f"{service.url}/health").status_code == 200  # it needs no key
        deadline = time.monotonic() + GIVE_UP_S
        while True:  # until the queue has room
            try:
                answer = client.completions.create(**{**settings, "max_tokens": 2})
                break
            except openai.RateLimitError:
                assert time.monotonic() < deadline
        assert answer.usage.completion_tokens == 2
    lines = [line for line in service.call_lines() if line["method"] == "POST /v1/completions"]
    assert {"OK", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"} <= {line["status"] for line in lines}
    assert {line["api_key_name"] for line in lines if line["status"] != "UNAUTHENTICATED"} == {"alice"}


def test_a_request_with_many_answers_leaves_room_in_the_queue(
    service: Service, secret: tuple[str, str], client: Client
) -> None:
    """It runs one answer per slot at once, so it needs no more places in the queue than the service has."""
    http = openai.DefaultHttpxClient(trust_env=False)
    settings = {"model": "stories-8m", "max_tokens": 8, "temperature": 0}
    prompts = [f"{PROMPT} {i}" for i in range(5 * (SLOTS + WAITING))]
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=secret[0], max_retries=0, http_client=http) as many,
        ThreadPoolExecutor(1) as pool,
    ):
        batch = pool.submit(many.completions.create, prompt=prompts, **settings)
        while not batch.done():
            assert client.generate("Once", SHORT).n_tokens
        assert len(batch.result().choices) == len(prompts)


def test_web_pages_of_named_origins_may_call(service: Service) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed, other = (
        http.request("OPTIONS", f"{service.url}/v1/completions", headers={**headers, "origin": origin})
        for origin in (ORIGIN, "https://other.example")
    )
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "access-control-allow-origin" not in other.headers


def test_a_client_that_does_not_read_delays_no_other(
    channel: grpc.Channel, client: Client, metadata: tuple, full_length: int
) -> None:
    sleeping = TinyLMStub(channel).GenerateStream(LONG_REQUEST, metadata=metadata)
    answers = [client.generate("Once", SamplingParams(max_tokens=20, temperature=0)).text for _ in range(2)]
    assert answers[0] == answers[1]
    messages = list(sleeping)
    assert messages[-1].usage.completion_tokens == full_length


def test_the_log_has_one_line_per_call_and_no_secret(service: Service, client: Client, secret) -> None:
    before = len(service.call_lines())
    client.generate(PROMPT, SHORT)
    list(client.stream(PROMPT, SHORT))
    with pytest.raises(ValueError, match="prompt has"):
        client.generate(PROMPT * 100)
    lines = service.call_lines()
    assert [(line["method"], line["status"]) for line in lines[before:]] == [
        ("Generate", "OK"), ("GenerateStream", "OK"), ("Generate", "INVALID_ARGUMENT"),
    ]  # fmt: skip
    for line in lines[before:-1]:
        assert (line["completion_tokens"], line["finish_reason"], line["api_key_name"]) == (2, "length", "alice")
        assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]
        assert line["request_id"]
    log = json.dumps(service.log_lines())
    assert PROMPT not in log
    assert secret[0] not in log


def stopped_by_ctrl_c(t: Terminal) -> bool:
    t.child.sendline(PROMPT)
    t.child.expect(r"\?2004l")  # the line editor is done
    t.child.expect(r"\w+ \w+")  # of the answer
    t.child.sendintr()
    if "cancelled" in t.prompt():
        return True
    t.child.sendline("/new")  # Ctrl-C came too late
    t.child.expect("another story")
    t.prompt()
    return False


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_cancelled_asyncio_task_ends_its_answer_in_the_service(
    service: Service, secret: tuple[str, str], full_length: int, streamed: bool
) -> None:
    async def leave() -> None:
        async with AsyncClient(service.address, retries=0, api_key=secret[0]) as client:
            if streamed:
                async for _ in client.stream(PROMPT, LONG):
                    break
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate(PROMPT, LONG), 0.05)

    before = len(cancelled(service))
    asyncio.run(leave())
    assert wait_for_cancelled(service, before + 1)[before]["completion_tokens"] < full_length


def test_ctrl_c_in_the_terminal_ends_the_answer(
    service: Service, secret: tuple[str, str], full_length: int, tmp_path: Path
) -> None:
    before = len(cancelled(service))
    options = ("--server", service.address, "-n", "250", "-t", "0")
    with terminal(*options, state=tmp_path, TINYLM_API_KEY=secret[0]) as t:
        assert any(stopped_by_ctrl_c(t) for _ in range(20))  # an answer can end before Ctrl-C comes
        assert wait_for_cancelled(service, before + 1)[before]["completion_tokens"] < full_length
        t.enter("/set max_tokens 2")
        assert "2 tokens" in t.enter("")


def test_the_web_page_asks_for_the_key_streams_and_stops(
    service: Service, client: Client, secret: tuple[str, str], full_length: int
) -> None:
    before = len(cancelled(service))
    with chromium() as browser, visit(browser, f"{service.url}/", expected_errors="401") as page:
        dialog, go, tokens = page.get_by_role("dialog"), page.locator("#go"), page.locator("#story .token")
        running = page.locator("[data-name=running] strong")
        expect(dialog).to_contain_text("no API key")
        page.keyboard.press("Escape")
        expect(page.locator("#live-state")).to_contain_text("no API key")

        page.get_by_label("Begin a story").fill(PROMPT)
        page.get_by_label("Length", exact=True).fill(str(LONG.max_tokens))
        page.get_by_label("Temperature", exact=True).fill("0")
        page.evaluate(STOP_AT_TOKEN, [10, "Escape"])  # inside the page: an answer takes less than a second
        go.click()
        page.get_by_label("API key").fill("nonsense")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("not valid")
        page.get_by_label("API key").fill(secret[0])
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()

        expect(page.locator("#status")).to_contain_text("Ended by you")
        assert 10 <= tokens.count() < full_length
        page.evaluate(STOP_AT_TOKEN, [20, "click"])
        go.click()
        expect(page.locator("#status")).to_contain_text("Ended by you")
        expect(go).to_have_text("Write")
        assert 20 <= tokens.count() < full_length
        expect(running).to_have_text("0")
        lines = wait_for_cancelled(service, before + 2)[before:]
        assert [line["method"] for line in lines] == ["POST /v1/completions"] * 2
        assert all(line["completion_tokens"] < full_length for line in lines)
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert page.evaluate("Object.values({ ...sessionStorage })") == [secret[0]]


def test_a_service_that_ends_finishes_running_requests(
    service: Service, client: Client, channel: grpc.Channel, full_length: int
) -> None:
    """The last test of this file: it ends the service."""
    (launcher,) = (p for p in psutil.Process().children() if str(service.config) in p.cmdline())
    stream = client.stream(PROMPT, LONG)
    next(stream)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    os.kill(launcher.pid, signal.SIGTERM)
    for _ in stream:
        pass
    assert stream.completion.n_tokens == full_length
    assert [message.status for message in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    assert launcher.wait(GIVE_UP_S) in (0, None)

"""configs/serve.yaml, started as users start it and asked over gRPC. `test_proxies` has what both proxies share."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
import yaml
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from helpers import docs_commands, fault_actions
from helpers.fault_load import FaultLoad, account
from helpers.service import PLAIN_PATH, Service
from helpers.tls import make_certificate, tls_front

from tinylm import LLM, SamplingParams
from tinylm.client import METADATA, AsyncClient, Client

LIMIT_S = 60
GREEDY = SamplingParams(max_tokens=24, temperature=0)
PROMPT = "Once upon a time"
pytestmark = pytest.mark.parametrize("shared_service", ["serve.yaml"], indirect=True)


@pytest.fixture
def service(shared_service: Service) -> Service:
    return shared_service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.address, retries=0) as client:
        yield client


def test_commands_and_programs_of_the_docs_work_on_a_service(service: Service, tmp_path: Path) -> None:
    """Run those of README.md and docs/*.md that ask localhost. Load tests run for a shorter time."""

    def here(text: str) -> str:
        text = text.replace("localhost:9000", service.address)
        return text.replace("localhost:8000", f"localhost:{service.http_port}")

    def follow(page: str) -> None:
        """Run a page's commands in order: a command can read what an earlier one has written."""
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

    pages = [command.page for command in docs_commands.commands() if docs_commands.is_for_a_service(command)]
    pages += [page for page, source in docs_commands.programs() if docs_commands.needs_service(source)]
    assert len(pages) > 10
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, dict.fromkeys(pages)))


def test_sampled_text_follows_its_seed_and_settings(client: Client, stories: LLM) -> None:
    params = SamplingParams(
        max_tokens=40, temperature=1.1, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=7,
        stop=("zz", "."), logprobs=3, prompt_logprobs=2, min_tokens=5, ignore_eos=True, stop_token_ids=(5,),
        logit_bias={300: 2.5},
        presence_penalty=0.2, frequency_penalty=0.1, bad_words=("was",), dry_multiplier=0.8, dry_base=2,
    )  # fmt: skip
    expected = stories.generate(PROMPT, params)[0]
    whole = client.generate(PROMPT, params)
    stream = client.stream(PROMPT, params)
    assert whole.text == "".join(stream) == expected.text
    assert "." not in whole.text
    for answer in (whole, stream.completion):
        assert answer.n_tokens == len(expected.token_ids)
        logprobs = [entry.logprob for entry in answer.logprobs]
        assert logprobs == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
        assert [len(entry.top) for entry in answer.logprobs] == [3] * len(expected.token_ids)
        scored = [entry.logprob for entry in answer.prompt_logprobs]
        assert scored == pytest.approx([entry.logprob for entry in expected.prompt_logprobs], abs=1e-3)
        assert len(scored) == len(stories.tokenizer.encode(PROMPT))


def test_a_prompt_can_be_scored_without_an_answer(client: Client, stories: LLM) -> None:
    answer = client.generate("The little dog", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (answer.text, answer.n_tokens, answer.finish_reason) == ("", 0, "length")
    total = sum(entry.logprob for entry in answer.prompt_logprobs)
    assert total == pytest.approx(stories.score("The little dog")[0].total, abs=1e-3)


def test_a_prompt_is_explained_over_grpc(service: Service, stories: LLM) -> None:
    with Client(service.address, timeout_s=LIMIT_S) as client:
        params = SamplingParams(temperature=0.9, top_p=0.9, seed=3)
        answer = client.explain(PROMPT, "scores", params)
        (expected,) = stories.generate(PROMPT, replace(params, max_tokens=1))
        assert [answer.scores.chosen.id] == [answer.scores.difference.token] == expected.token_ids
        with pytest.raises(ValueError, match="layer is 17: it must be a whole number, 1 to 16"):
            client.explain(PROMPT, "attention", layer=17)

        assert client.explain("", "batch").batch.complete  # from now on, steps are recorded
        client.generate(PROMPT, GREEDY)
        time.sleep(1)  # an older view is kept for half a second
        steps = [step for replica in client.explain("", "batch").batch.replicas for step in replica.steps]
        assert {share.kind for step in steps for share in step.shares} == {"prompt", "answer"}


def test_the_asynchronous_client_gets_the_same_answers(service: Service, client: Client) -> None:
    """With many streams at once."""
    settings = [SamplingParams(max_tokens=24, seed=seed, logprobs=1) for seed in range(32)]
    expected = [client.generate(PROMPT, params).text for params in settings]

    async def streamed(asking: AsyncClient, params: SamplingParams) -> str:
        return "".join([piece async for piece in asking.stream(PROMPT, params)])

    async def ask() -> None:
        async with AsyncClient(service.address, retries=0) as asking:
            assert await asyncio.gather(*(streamed(asking, params) for params in settings)) == expected
            whole = await asyncio.gather(*(asking.generate(PROMPT, params) for params in settings))
            assert [answer.text for answer in whole] == expected
            assert (await asking.info()).name == "stories-8m"
            tokens = await asking.tokenize("a cat")
            assert tokens == client.tokenize("a cat")
            ids = [token for token, _ in tokens]
            assert await asking.detokenize(ids) == client.detokenize(ids) == "a cat"

    asyncio.run(ask())


def test_tokens_and_model_are_those_of_the_library(client: Client, stories: LLM) -> None:
    text = "Zoë said: \u2581 “hello” 🎉\n"
    tokens = client.tokenize(text)
    assert [token for token, _ in tokens] == stories.tokenizer.encode(text)
    assert b"".join(piece for _, piece in tokens).decode() == text
    info = client.info()
    assert (info.name, info.parameters, info.weights) == ("stories-8m", stories.config.n_parameters, "int8")
    assert (info.vocab_size, info.context, info.layers) == (4096, 256, 16)
    assert info.arithmetic == stories.model.arithmetic


def test_the_write_command_uses_the_service(service: Service, client: Client) -> None:
    story = PROMPT + client.generate(PROMPT, GREEDY).text
    story += client.generate(story, GREEDY).text
    command = [sys.executable, "-m", "tinylm.cli", "write", "--server", service.address, "-t", "0", "-n", "24"]
    done = subprocess.run(command, input=f"{PROMPT}\n\n", capture_output=True, text=True, check=True)
    assert done.stdout == story.removesuffix("\n") + "\n"


def test_a_client_may_name_several_proxies(service: Service, client: Client) -> None:
    """HAProxy refuses the host name with a comma that gRPC would send."""
    with Client(f"ipv4:127.0.0.1:1,127.0.0.1:{service.grpc_port}", retries=0) as several:
        assert several.info().name == client.info().name


def test_tls_works_in_front_of_the_service(service: Service, tmp_path: Path, stories: LLM) -> None:
    with (
        tls_front(make_certificate(tmp_path), service.grpc_port, service.http_port) as front,
        Client(front.address, tls=front.ca, retries=0) as client,
    ):
        expected = stories.generate(PROMPT, GREEDY)[0].text
        assert client.generate(PROMPT, GREEDY).text == "".join(client.stream(PROMPT, GREEDY)) == expected
        with pytest.raises(ValueError, match="65536"):
            client.generate("a" * 90_000)


def test_a_general_client_needs_only_the_address(service: Service, stories: LLM) -> None:
    """It learns service, methods and messages by reflection."""
    with grpc.insecure_channel(service.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        (name,) = [name for name in database.get_services() if name.startswith("tinylm.")]
        method = DescriptorPool(database).FindServiceByName(name).FindMethodByName("Generate")
        request_type, answer_type = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
        call = channel.unary_unary(f"/{name}/{method.name}", request_type.SerializeToString, answer_type.FromString)
        request = json_format.ParseDict({"prompt": PROMPT, "maxTokens": 24, "temperature": 0}, request_type())
        answer = json_format.MessageToDict(call(request, metadata=METADATA))
    assert answer["text"] == stories.generate(PROMPT, GREEDY)[0].text


def test_the_command_of_the_ready_message_works(service: Service) -> None:
    """In the shell that ran `make serve`, whose path has no .venv."""
    suggestion = re.search(r"try it:\s+(.*)", service.log)
    assert suggestion is not None
    result = subprocess.run(
        suggestion[1], shell=True, capture_output=True, text=True, check=True, env={**os.environ, "PATH": PLAIN_PATH}
    )
    assert result.stdout.startswith(PROMPT)
    assert len(result.stdout) > len(PROMPT) + 8


@pytest.mark.parametrize("mode", [[], ["--stream"]], ids=["unary", "stream"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_load_test_counts_every_answer(service: Service, protocol: str, mode: list[str], tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    server = service.url if protocol == "http" else service.address
    command = [sys.executable, "-m", "loadtest", "--server", server, "--concurrency", "3", "--duration", "1"]
    subprocess.run([*command, "--warmup", "0", "-n", "8", "--output", str(output), *mode], check=True)
    (run,) = json.loads(output.read_text())["runs"]
    assert run["statuses"] == {"OK": run["requests"]}
    assert run["requests_per_s"] == pytest.approx(run["requests"], abs=1e-3)
    assert 0 < run["latency_ms"]["p50"] <= run["latency_ms"]["p99"] <= run["latency_ms"]["max"]
    assert ("ttft_ms" in run) == bool(mode)
    if protocol == "grpc":
        assert sum(run["replicas"].values()) == run["requests"]
        by_role = run["server"]["by_role"]
        assert {"replicas", "proxy"} <= set(by_role)
        assert by_role["engines"] > 0


# The short form of tests/chaos. The last test replaces a replica.


def test_haproxy_gets_the_slots_of_the_replicas(service: Service) -> None:
    """The launcher reads them from the config. With fewer cores than replicas, HAProxy fills some replicas first."""
    (application,) = yaml.safe_load(service.config.read_text(encoding="utf-8"))["applications"]
    slots, cores = application["args"]["slots"], len(os.sched_getaffinity(0))
    deadline = time.monotonic() + LIMIT_S  # Ray writes the config again when it learns of another replica
    rules = ""
    while f"be_conn ge {4 * slots}\n" not in rules:
        assert time.monotonic() < deadline, rules
        time.sleep(0.1)
        with suppress(psutil.NoSuchProcess):
            arguments = psutil.Process(service.mark.processes("haproxy")[0]).cmdline()
            rules = Path(arguments[arguments.index("-f") + 1]).read_text(encoding="utf-8")
    assert len(re.findall(rf"use-server .* lt {slots} }}", rules)) == (2 * cores if cores < 4 else 0)  # gRPC and HTTP


def test_haproxy_listens_only_on_loopback(service: Service) -> None:
    """With gRPC, HTTP, its metrics and its statistics."""
    (pid, *_) = service.mark.processes("haproxy")
    found = [of.laddr for of in psutil.Process(pid).net_connections("tcp") if of.status == psutil.CONN_LISTEN]
    assert "127.0.0.1" in {address.ip for address in found} <= {"127.0.0.1", "::1"}
    assert len({address.port for address in found}) == 4


def test_no_request_breaks_the_service(service: Service) -> None:
    before = service.replicas()
    statuses = fault_actions.fuzz(service.address)
    assert set(statuses) == {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, statuses
    assert service.replicas() == before


def test_a_full_queue_refuses_and_loses_no_call(service: Service) -> None:
    statuses = fault_actions.fill_queue(service.address, 800)
    assert set(statuses) == {"OK", "RESOURCE_EXHAUSTED"}, statuses
    assert statuses["OK"] >= 4 * 16


def test_no_request_is_lost_when_a_replica_is_killed(service: Service, stories: LLM) -> None:
    expected = stories.generate(PROMPT, GREEDY)[0].text
    with FaultLoad([service.address], 4, PROMPT, expected, GREEDY.max_tokens) as load:
        victim = next(iter(service.replicas().values()))
        fault_at = time.perf_counter()
        service.mark.signal(signal.SIGKILL, [victim])
        service.wait_until_healthy(LIMIT_S, without=[victim])
    figures = account(load.requests, fault_at)
    assert figures["answered"] > 0
    assert figures["lost"] == 0, figures

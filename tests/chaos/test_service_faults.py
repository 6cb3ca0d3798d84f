"""configs/serve.yaml under load while its parts are killed, and what its callers notice."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers import fault_actions
from helpers.fault_load import FaultLoad, account
from helpers.marked import resident_mib
from helpers.service import Service, running_service

from tinylm import LLM, SamplingParams

pytestmark = pytest.mark.chaos

PROMPT, MAX_TOKENS, CLIENTS = "Once upon a time", 48, 4
HEAL_LIMIT_S = 120
BEFORE_S, AFTER_S = 3, 3  # of load, before the fault and after full health
GROWTH_MIB = 16  # permitted growth of a replica's memory: caches of gRPC and of the allocator
Kill = Callable[[Service], list[int]]


def a_replica(service: Service) -> list[int]:
    return list(service.replicas().values())[:1]


def processes(*named: str) -> Kill:
    return lambda service: [process for name in named for process in service.mark.processes(name)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(Path("configs/serve.yaml"), tmp_path_factory.mktemp("service")) as service:
        service.wait_until_healthy(HEAL_LIMIT_S)
        yield service


@pytest.fixture(scope="module")
def expected(stories: LLM) -> str:
    return stories.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS, temperature=0))[0].text


def load(service: Service, expected: str) -> FaultLoad:
    return FaultLoad([service.address], CLIENTS, PROMPT, expected, MAX_TOKENS)


@pytest.mark.parametrize(
    ("name", "victims", "number"),
    [
        ("a replica is killed", a_replica, signal.SIGKILL),
        ("HAProxy is killed", processes("haproxy"), signal.SIGKILL),
        ("Serve's proxy actor is killed", processes("ray::HAProxyManager", "ray::ProxyActor"), signal.SIGKILL),
        ("Serve's controller is killed", processes("ray::ServeController"), signal.SIGKILL),
        ("a replica is stopped (SIGSTOP)", a_replica, signal.SIGSTOP),
        pytest.param(
            "Ray's head is killed (GCS and raylet)",
            processes("gcs_server", "raylet"),
            signal.SIGKILL,
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_part_is_killed_under_load(
    service: Service, expected: str, faults: dict[str, dict], name: str, victims: Kill, number: signal.Signals
) -> None:
    with load(service, expected) as running:
        time.sleep(BEFORE_S)
        assert {request.outcome for request in running.requests} == {"answered"}
        gone = victims(service)
        assert gone, service.mark.processes()
        fault_at = time.perf_counter()
        service.mark.signal(number, gone)
        healed_s = service.wait_until_healthy(HEAL_LIMIT_S, without=gone, successors=lambda: victims(service))
        healed_at = time.perf_counter()
        time.sleep(AFTER_S)
    faults[name] = figures = {
        **account(running.requests, fault_at),
        "healed_s": round(healed_s, 1),
        "clients": CLIENTS,
        "haproxy_processes": len(service.mark.processes("haproxy")),  # the one of a killed manager continues
    }
    assert figures["lost"] == 0, figures
    late = {request.outcome for request in running.requests if request.sent_at > healed_at + 1}
    assert late == {"answered"}


def test_a_full_queue_refuses_and_loses_no_call(service: Service, faults: dict[str, dict]) -> None:
    statuses = fault_actions.fill_queue(service.address, 1000)
    healed_s = service.wait_until_healthy(HEAL_LIMIT_S)
    faults["the queue is full (1,000 calls at once)"] = of_statuses(statuses, healed_s)
    assert set(statuses) == {"OK", "RESOURCE_EXHAUSTED"}, statuses


def test_many_cancellations(service: Service, faults: dict[str, dict]) -> None:
    fault_actions.cancel(service.address, 100)
    before = memory(service)
    statuses = fault_actions.cancel(service.address, 1000)
    healed_s = service.wait_until_healthy(HEAL_LIMIT_S)
    figures = faults["1,000 streams are cancelled"] = of_statuses(statuses, healed_s, before, memory(service))
    assert set(statuses) == {"CANCELLED"}, statuses
    assert figures["memory_growth_mib"] < GROWTH_MIB


def test_deadlines_shorter_than_the_answer(service: Service, faults: dict[str, dict]) -> None:
    statuses = fault_actions.short_deadlines(service.address, 500)
    faults["deadlines of 5 ms (500 calls)"] = of_statuses(statuses, service.wait_until_healthy(HEAL_LIMIT_S))
    assert set(statuses) == {"DEADLINE_EXCEEDED"}, statuses


def test_no_request_breaks_the_service(service: Service, faults: dict[str, dict]) -> None:
    fault_actions.fuzz(service.address, rounds=20)  # fills the allocators' caches for messages of this size
    before = memory(service)
    statuses = fault_actions.fuzz(service.address, rounds=20)
    healed_s = service.wait_until_healthy(HEAL_LIMIT_S)
    figures = faults["damaged and extreme requests"] = of_statuses(statuses, healed_s, before, memory(service))
    assert set(statuses) <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, statuses
    assert figures["memory_growth_mib"] < GROWTH_MIB


def test_a_damaged_model_is_rolled_out(
    service: Service, expected: str, faults: dict[str, dict], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree("models/stories-8m", damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged")
    values = yaml.safe_load(service.config.read_text(encoding="utf-8"))
    values["applications"][0]["args"]["model"] = str(damaged)
    rollout = tmp_path / "serve.yaml"
    rollout.write_text(yaml.safe_dump(values), encoding="utf-8")

    with load(service, expected) as running:
        time.sleep(BEFORE_S)
        fault_at = time.perf_counter()
        service.deploy(rollout)
        assert fault_actions.settled(lambda: service.status() in ("DEPLOY_FAILED", "UNHEALTHY"), HEAL_LIMIT_S)
        kept = len(service.replicas())
        time.sleep(AFTER_S)
        repaired_at = time.perf_counter()
        service.deploy(service.config)
        assert fault_actions.settled(lambda: service.status() == "RUNNING", HEAL_LIMIT_S)
        service.wait_until_healthy(HEAL_LIMIT_S)
        healed_s = time.perf_counter() - repaired_at
        time.sleep(AFTER_S)
    faults["a damaged model is rolled out, then the good one"] = figures = {
        **account(running.requests, fault_at),
        "healed_s": round(healed_s, 1),
        "clients": CLIENTS,
        "replicas_kept": kept,
    }
    assert figures["lost"] == 0, figures
    assert kept >= 3


def test_the_disk_is_full_while_a_model_is_written(tmp_path: Path, stories: LLM, faults: dict[str, dict]) -> None:
    """A limit on the file size acts as a full disk: writing fails in the middle of the weights."""
    model = tmp_path / "model"
    shutil.copytree("models/stories-8m", model)
    script = (
        "import sys, resource, numpy as np\n"
        "from pathlib import Path\n"
        "from tinylm import ModelConfig\n"
        "from tinylm.weights import save_model, tensor_shapes\n"
        "directory = Path(sys.argv[1])\n"
        "config = ModelConfig()\n"
        "tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "save_model(directory, config, tensors, (directory / 'tokenizer.model').read_bytes())\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=False)
    params = SamplingParams(max_tokens=8, temperature=0)
    assert result.returncode != 0
    assert "OSError" in result.stderr, result.stderr
    assert LLM(model).generate(PROMPT, params)[0].text == stories.generate(PROMPT, params)[0].text
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "an incomplete model is left"
    faults["the disk is full while a model is exported"] = {"requests": 1, "refused": 1, "lost": 0}


def memory(service: Service) -> dict[int, float]:
    return {process: resident_mib(process) for process in service.replicas().values()}


def of_statuses(
    statuses: dict[str, int],
    healed_s: float,
    before: dict[int, float] | None = None,
    after: dict[int, float] | None = None,
) -> dict:
    """Return the report's entry for a fault that callers cause."""
    figures = {
        "requests": sum(count for status, count in statuses.items() if ":" not in status),
        "answered": statuses["OK"],
        "refused": sum(count for status, count in statuses.items() if status != "OK" and ":" not in status),
        "lost": sum(statuses[status] for status in ("INTERNAL", "UNKNOWN", "UNAVAILABLE")),
        "statuses": dict(statuses),
        "healed_s": round(healed_s, 1),
    }
    if before and after:
        assert set(before) == set(after), "a replica was replaced"
        figures["memory_growth_mib"] = round(max(after[process] - before[process] for process in before), 1)
    return figures

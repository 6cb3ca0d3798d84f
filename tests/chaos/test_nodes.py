"""configs/cluster/serve.yaml on two nodes: one is killed under load and comes back."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.fault_load import FaultLoad, account
from ray_cluster import RayCluster, RayNode, wait_until

from tinylm import LLM, SamplingParams
from tinylm.client import Client
from tinylm.serving.keys import make_key

pytestmark = pytest.mark.chaos

PROMPT, MAX_TOKENS = "Once upon a time", 48
CLIENTS = 4
REPLICAS = 4
DEPLOY_LIMIT_S, HEAL_LIMIT_S = 180, 120
BEFORE_S, AFTER_S = 5, 10  # of load, before the fault and after full health


def config(replicas: int, key_file: Path) -> dict:
    """Return the committed config with a fixed number of replicas and this key file."""
    values = yaml.safe_load(Path("configs/cluster/serve.yaml").read_text(encoding="utf-8"))
    (application,) = values["applications"]
    application["args"]["api_keys"] = str(key_file)
    (deployment,) = application["deployments"]
    deployment["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
    return values


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a key file. The clients of the test have its key."""
    key, line = make_key("chaos")
    monkeypatch.setenv("TINYLM_API_KEY", key)
    path = tmp_path / "keys.txt"
    path.write_text(f"{line}\n", encoding="utf-8")
    return path


@pytest.fixture
def cluster(tmp_path: Path, key_file: Path) -> Iterator[tuple[RayCluster, RayNode]]:
    with RayCluster(tmp_path) as cluster:
        worker = cluster.join()
        cluster.deploy(config(REPLICAS, key_file))
        wait_until(lambda: cluster.healthy(REPLICAS), "all replicas run", DEPLOY_LIMIT_S)
        yield cluster, worker


def ask(node: RayNode) -> str:
    with Client(node.address) as client:
        return client.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS, temperature=0)).text


def test_a_node_is_killed_under_load_and_comes_back(
    cluster: tuple[RayCluster, RayNode], key_file: Path, stories: LLM, faults: dict[str, dict]
) -> None:
    ray, worker = cluster
    expected = stories.generate(PROMPT, SamplingParams(max_tokens=MAX_TOKENS, temperature=0))[0].text
    assert Counter(ray.replicas()) == {ray.head.ip: 2, worker.ip: 2}
    assert ask(ray.head) == ask(worker) == expected

    places = [f"ipv4:{ray.head.address},{worker.address}", f"ipv4:{worker.address},{ray.head.address}"]
    with FaultLoad(places, CLIENTS, PROMPT, expected, MAX_TOKENS) as load:
        time.sleep(BEFORE_S)
        assert [r for r in load.requests if r.outcome != "answered"] == []
        fault_at = time.perf_counter()
        worker.kill()
        wait_until(lambda: worker.ip not in ray.alive(), "the head notices the loss", HEAL_LIMIT_S)
        wait_until(lambda: ray.healthy(REPLICAS), "the replicas are back", HEAL_LIMIT_S)
        healed_s = time.perf_counter() - fault_at
        healed_at = time.perf_counter()
        time.sleep(AFTER_S)
    faults["a worker node is killed"] = figures = {
        **account(load.requests, fault_at),
        "healed_s": round(healed_s, 1),
        "clients": CLIENTS,
    }
    assert set(ray.replicas()) == {ray.head.ip}
    assert figures["lost"] == 0, figures
    late = [request for request in load.requests if request.sent_at > healed_at]
    assert late
    assert {request.outcome for request in late} == {"answered"}

    returned = ray.join()
    more = REPLICAS + 2  # more than one node holds, so the new replicas go to the node that came back
    ray.deploy(config(more, key_file))
    wait_until(lambda: ray.healthy(more), "replicas run on the node that came back", DEPLOY_LIMIT_S)
    assert Counter(ray.replicas())[returned.ip] == 2
    assert ask(ray.head) == ask(returned) == expected

"""The Kubernetes manifest and the Dockerfile agree with the other files. The tests need no Kubernetes and no Docker."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path("configs/cluster")
SERVE = CLUSTER / "serve.yaml"
DOCKERFILE = CLUSTER / "Dockerfile"


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    """kind -> document"""
    documents = yaml.safe_load_all((CLUSTER / "rayservice.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def cluster(manifest: dict[str, dict]) -> dict:
    return manifest["RayService"]["spec"]["rayClusterConfig"]


@pytest.fixture(scope="module")
def groups(cluster: dict) -> list[dict]:
    """The head's and the workers' specs."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.fixture(scope="module")
def containers(groups: list[dict]) -> list[dict]:
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_the_manifest_contains_the_cluster_s_serve_config(manifest: dict[str, dict]) -> None:
    assert manifest["RayService"]["spec"]["serveConfigV2"] == SERVE.read_text(encoding="utf-8")


def test_the_ray_version_is_the_installed_one(cluster: dict) -> None:
    assert f"\nray=={cluster['rayVersion']}\n" in Path("constraints.txt").read_text(encoding="utf-8")


def test_pods_run_as_the_image_s_ordinary_user(groups: list[dict], containers: list[dict]) -> None:
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    for group in groups:
        security = group["template"]["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == int(user) != 0
    for container in containers:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_workers_have_room_for_all_replicas(cluster: dict) -> None:
    (deployment,) = yaml.safe_load(SERVE.read_text(encoding="utf-8"))["applications"][0]["deployments"]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    a_worker = int(container["resources"]["limits"]["cpu"]) // deployment["ray_actor_options"]["num_cpus"]
    assert a_worker >= deployment["max_replicas_per_node"]
    autoscaling = deployment["autoscaling_config"]
    assert workers["maxReplicas"] * a_worker >= autoscaling["max_replicas"]
    assert (workers["minReplicas"] - 1) * a_worker >= autoscaling["min_replicas"]  # without one worker


def test_ports_and_probes_agree_with_the_serve_config(
    manifest: dict[str, dict], groups: list[dict], containers: list[dict]
) -> None:
    serve = yaml.safe_load(SERVE.read_text(encoding="utf-8"))
    for container in containers:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
        assert ports["grpc"] == serve["grpc_options"]["port"]
        for probe in (container["livenessProbe"], container["readinessProbe"]):
            assert probe["httpGet"]["port"] in {*ports, 52365}  # the port of Ray's agent
    service = manifest["Service"]["spec"]
    (port,) = service["ports"]
    assert (port["port"], port["targetPort"]) == (serve["grpc_options"]["port"], "grpc")
    labels = {"ray.io/serve": "true"}  # KubeRay adds it
    for group in groups:
        assert service["selector"].items() <= (labels | group["template"]["metadata"]["labels"]).items()


def test_every_pod_mounts_the_key_file(groups: list[dict]) -> None:
    (application,) = yaml.safe_load(SERVE.read_text(encoding="utf-8"))["applications"]
    for group in groups:
        spec = group["template"]["spec"]
        (volume,) = spec["volumes"]
        for container in spec["containers"]:
            (mount,) = container["volumeMounts"]
            assert mount["name"] == volume["name"]
            assert Path(application["args"]["api_keys"]).parent == Path(mount["mountPath"])


def copied() -> list[Path]:
    lines = re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    return [Path(source) for line in lines for source in shlex.split(line)[:-1]]


def test_everything_that_the_image_copies_is_committed() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert sorted(map(str, copied())) == sorted(allowed)
    for path in copied():
        assert any(file == str(path) or file.startswith(f"{path}/") for file in tracked), path


def test_the_image_installs_as_the_makefile_does() -> None:
    makefile = Path("Makefile").read_text(encoding="utf-8")
    (pip,) = re.findall(r"^PIP := \$\(BIN\)/(.*)$", makefile, re.MULTILINE)
    (arguments,) = re.findall(r"^\$\(VENV\)/serving:.*\n\t\$\(PIP\) (.*)$", makefile, re.MULTILINE)
    assert f"\nRUN {pip} {arguments}\n" in DOCKERFILE.read_text(encoding="utf-8")

"""The Kubernetes manifest and the Dockerfile, held to what they name: there is no Kubernetes and no Docker here."""

import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

CLUSTER = Path("configs/cluster")
SERVE = CLUSTER / "serve.yaml"
DOCKERFILE = CLUSTER / "Dockerfile"
# The fields of KubeRay's ray.io/v1 that TinyLM may use; Kubernetes refuses what it doesn't know only when asked to.
RAY_SERVICE = {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc", "serveService"}
RAY_CLUSTER = {
    *("rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions"),
    *("gcsFaultToleranceOptions", "authOptions"),
}
AUTOSCALER = {"resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "env"}
HEAD = {"rayStartParams", "template", "serviceType", "headService"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts"}
# And those of Kubernetes itself.
POD = {
    *("containers", "initContainers", "volumes", "securityContext", "terminationGracePeriodSeconds", "affinity"),
    *("topologySpreadConstraints", "nodeSelector", "tolerations", "imagePullSecrets", "serviceAccountName"),
}
CONTAINER = {
    *("name", "image", "imagePullPolicy", "env", "envFrom", "ports", "resources", "volumeMounts", "lifecycle"),
    *("livenessProbe", "readinessProbe", "startupProbe", "securityContext", "command", "args"),
}
PROBE = {
    *("httpGet", "exec", "grpc", "tcpSocket", "initialDelaySeconds", "periodSeconds", "timeoutSeconds"),
    *("failureThreshold", "successThreshold"),
}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")


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


def test_kubernetes_serves_the_same_config_as_a_cluster_by_hand(manifest: dict[str, dict]) -> None:
    assert manifest["RayService"]["spec"]["serveConfigV2"] == SERVE.read_text(encoding="utf-8")


def test_every_field_is_one_that_kuberay_and_kubernetes_know(manifest: dict[str, dict], groups: list[dict]) -> None:
    service = manifest["RayService"]
    assert (service["apiVersion"], set(service)) == ("ray.io/v1", {"apiVersion", "kind", "metadata", "spec"})
    assert set(service["spec"]) <= RAY_SERVICE
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
    assert [set(group) - fields for group, fields in zip(groups, (HEAD, WORKERS), strict=True)] == [set(), set()]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert set(group["template"]) == {"metadata", "spec"}
        assert set(group["template"]["spec"]) <= POD
        for container in group["template"]["spec"]["containers"]:
            assert set(container) <= CONTAINER
            assert all(set(container[name]) <= PROBE for name in ("livenessProbe", "readinessProbe"))
            assert all(isinstance(variable["value"], str) for variable in container["env"])


def test_the_ray_version_is_the_one_that_is_installed(cluster: dict) -> None:
    assert f"\nray=={cluster['rayVersion']}\n" in Path("constraints.txt").read_text(encoding="utf-8")


def test_pods_run_as_an_ordinary_user_that_the_image_has(groups: list[dict], containers: list[dict]) -> None:
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    for group in groups:
        security = group["template"]["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == int(user) != 0
    for container in containers:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_each_container_says_what_it_needs(containers: list[dict]) -> None:
    for container in containers:
        for kind in ("requests", "limits"):
            assert set(container["resources"][kind]) == {"cpu", "memory"}
            assert all(QUANTITY.fullmatch(quantity) for quantity in container["resources"][kind].values())


def test_the_workers_have_room_for_the_replicas_they_may_get(cluster: dict) -> None:
    (deployment,) = yaml.safe_load(SERVE.read_text(encoding="utf-8"))["applications"][0]["deployments"]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    a_worker = int(container["resources"]["limits"]["cpu"]) // deployment["ray_actor_options"]["num_cpus"]
    assert a_worker >= deployment["max_replicas_per_node"]
    autoscaling = deployment["autoscaling_config"]
    assert workers["maxReplicas"] * a_worker >= autoscaling["max_replicas"]
    assert (workers["minReplicas"] - 1) * a_worker >= autoscaling["min_replicas"]  # one worker may be lost


def test_ports_are_those_of_the_serve_config_and_every_probe_asks_one_of_them(
    manifest: dict[str, dict], groups: list[dict], containers: list[dict]
) -> None:
    serve = yaml.safe_load(SERVE.read_text(encoding="utf-8"))
    for container in containers:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == serve["http_options"]["port"]
        assert ports["grpc"] == serve["grpc_options"]["port"]
        for probe in (container["livenessProbe"], container["readinessProbe"]):
            assert probe["httpGet"]["port"] in {*ports, 52365}  # and that of Ray's agent
    service = manifest["Service"]["spec"]
    (port,) = service["ports"]
    assert (port["port"], port["targetPort"]) == (serve["grpc_options"]["port"], "grpc")
    labels = {"ray.io/serve": "true"}  # by KubeRay
    for group in groups:
        assert service["selector"].items() <= (labels | group["template"]["metadata"]["labels"]).items()


def test_one_image_for_head_and_workers(containers: list[dict]) -> None:
    assert len({container["image"] for container in containers}) == 1


def test_every_pod_has_the_key_file_where_the_config_looks_for_it(groups: list[dict]) -> None:
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


def test_all_that_the_image_copies_is_committed_and_let_through() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert sorted(map(str, copied())) == sorted(allowed)
    for path in copied():
        assert any(file == str(path) or file.startswith(f"{path}/") for file in tracked), path


def test_the_image_has_every_package_and_the_models_of_the_config() -> None:
    sources = {str(path) for path in copied()}
    assert {"tinylm", "serve_app.py"} <= sources
    model = yaml.safe_load(SERVE.read_text(encoding="utf-8"))["applications"][0]["args"]["model"]
    assert any(fnmatch(model, source) for source in sources)


def test_the_image_installs_by_the_makefile_s_line() -> None:
    makefile = Path("Makefile").read_text(encoding="utf-8")
    (pip,) = re.findall(r"^PIP := \$\(BIN\)/(.*)$", makefile, re.MULTILINE)
    (arguments,) = re.findall(r"^\$\(VENV\)/serving:.*\n\t\$\(PIP\) (.*)$", makefile, re.MULTILINE)
    assert f"\nRUN {pip} {arguments}\n" in DOCKERFILE.read_text(encoding="utf-8")

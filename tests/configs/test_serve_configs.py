"""The Serve configs have only known keys, which Serve itself does not check, and the launcher reads them."""

import importlib.util
import socket
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import schema
from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S
from ray.serve.config import AutoscalingConfig, ControllerOptions

from serve_app import AppArgs, with_absolute_paths
from tinylm.serving import keys
from tinylm.serving.ray import launch
from tinylm.serving.ray.environment import PORTS_OF_A_SERVICE
from tinylm.serving.ray.server import drain_limit_s
from tinylm.weights import ModelError, load_model

CONFIGS = [Path("configs/serve.yaml"), Path("configs/serve-python-proxy.yaml")]
CLUSTER = Path("configs/cluster/serve.yaml")


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def unknown_keys(values: dict, model: type[BaseModel], where: str) -> list[str]:
    return [f"{where}.{key}" for key in values if key not in model.model_fields]


@pytest.mark.parametrize("path", [*CONFIGS, CLUSTER], ids=str)
def test_serve_knows_every_key(path: Path) -> None:
    config = load(path)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    unknown = [
        *unknown_keys(config, schema.ServeDeploySchema, "top"),
        *unknown_keys(config["http_options"], schema.HTTPOptionsSchema, "http_options"),
        *unknown_keys(config["grpc_options"], schema.gRPCOptionsSchema, "grpc_options"),
        *unknown_keys(config.get("controller_options", {}), ControllerOptions, "controller_options"),
        *unknown_keys(application, schema.ServeApplicationSchema, "application"),
        *unknown_keys(deployment, schema.DeploymentSchema, "deployment"),
        *unknown_keys(deployment["ray_actor_options"], schema.RayActorOptionsSchema, "ray_actor_options"),
        *unknown_keys(deployment.get("autoscaling_config", {}), AutoscalingConfig, "autoscaling_config"),
    ]
    assert unknown == []
    schema.ServeDeploySchema.model_validate(config)
    AppArgs.model_validate(application["args"])


@pytest.mark.parametrize("path", [*CONFIGS, CLUSTER], ids=str)
def test_ray_reads_every_environment_variable(path: Path) -> None:
    """Ray ignores a misspelt variable."""
    spec = importlib.util.find_spec("ray.serve._private.constants")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    names = load(path)["controller_options"]["runtime_env"]["env_vars"]
    assert names
    assert [name for name in names if f'"{name}"' not in source] == []


def test_the_launcher_reads_addresses_and_slots(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    config = load(CONFIGS[0])
    assert launch.read_config(CONFIGS[0]) == ("localhost", 9000, 8000, config["applications"][0]["args"]["slots"], True)
    del config["applications"][0]["args"]["slots"], config["grpc_options"]["port"]
    for host, reached_at in (("0.0.0.0", "localhost"), ("192.0.2.7", "192.0.2.7"), ("::1", "[::1]")):
        config["http_options"]["host"] = host
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        assert launch.read_config(path) == (reached_at, 9000, 8000, AppArgs().slots, True)
    for text in ("- 1", "http_options: {port: x}", "applications: [{args: {slots: many}}]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="is not a Serve config"):
            launch.read_config(path)


@pytest.mark.parametrize("named_by", ["RAY_ADDRESS", "ray_current_cluster"])
def test_a_missing_ray_head_is_an_error_at_once(tmp_path: Path, monkeypatch, named_by: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not launch.check_cluster()  # no cluster is named
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        if named_by == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        else:
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray" / named_by).write_text(f"{address}\n", encoding="utf-8")
        assert launch.check_cluster()
    with pytest.raises(ValueError, match=rf"Ray's head at {address}, which .*{named_by} names, does not answer"):
        launch.check_cluster()
    for other in ("local", "ray://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", other)
        assert launch.check_cluster() == (other != "local")


def test_a_new_target_of_a_link_is_a_new_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve replaces replicas whose arguments differ."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "current").symlink_to("version-1")
    first = with_absolute_paths(AppArgs(model=Path("current"), api_keys=Path("keys.txt")))
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("version-2")
    second = with_absolute_paths(AppArgs(model=Path("current")))
    assert (first.model, second.model) == (tmp_path / "version-1", tmp_path / "version-2")
    assert (first.api_keys, second.api_keys) == (tmp_path / "keys.txt", None)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ModelError, match="no model directory at"):
        load_model(with_absolute_paths(AppArgs(model=Path("a"))).model)


def test_a_changed_secret_of_kubernetes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted secret is a link through `..data`. An update gives `..data` a new target and removes the old one."""
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0)
    secrets = []
    for version in ("..1", "..2"):
        (tmp_path / version).mkdir()
        secrets.append(keys.add_key(tmp_path / version / "keys.txt", "alice"))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.txt").symlink_to("..data/keys.txt")
    path = with_absolute_paths(AppArgs(api_keys=tmp_path / "keys.txt")).api_keys
    assert path is not None
    known = keys.KeyFile(path)
    assert [known.find(secret) is not None for secret in secrets] == [True, False]
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").replace(tmp_path / "..data")
    (tmp_path / "..1" / "keys.txt").unlink()
    assert [known.find(secret) is not None for secret in secrets] == [False, True]


def test_the_two_configs_differ_only_in_the_proxy() -> None:
    haproxy, python_proxy = map(load, CONFIGS)
    del haproxy["controller_options"], python_proxy["controller_options"]
    assert haproxy == python_proxy
    assert haproxy["applications"][0]["deployments"][0]["num_replicas"] == 4


def test_the_cluster_config_shares_all_other_keys() -> None:
    single, cluster = load(CONFIGS[0]), load(CLUSTER)
    assert cluster.pop("proxy_location") == "EveryNode"
    assert cluster["http_options"].pop("host") == "0.0.0.0"
    assert single.pop("proxy_location") == "HeadOnly"
    del single["http_options"]["host"]
    del cluster["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S"]
    assert cluster["applications"][0]["args"].pop("api_keys")  # callers are on other machines
    assert cluster["applications"][0]["args"].pop("model")  # the package can be in different directories
    (one,), (many,) = (config["applications"][0]["deployments"] for config in (single, cluster))
    autoscaling = many.pop("autoscaling_config")
    assert autoscaling["min_replicas"] == one.pop("num_replicas")
    assert 0 < autoscaling["target_ongoing_requests"] < cluster["applications"][0]["args"]["slots"]
    assert many.pop("max_replicas_per_node") <= autoscaling["max_replicas"]
    assert many["ray_actor_options"].pop("num_cpus") == 1
    del one["ray_actor_options"]["num_cpus"]
    assert cluster == single


@pytest.mark.parametrize("path", [CONFIGS[0], CLUSTER], ids=str)
def test_replicas_that_often_end_do_not_use_up_the_ports(path: Path) -> None:
    """The port of a replica that has ended is not used for a while. One may end each second."""
    config = load(path)
    (deployment,) = config["applications"][0]["deployments"]
    most = deployment.get("max_replicas_per_node") or deployment["num_replicas"]
    quarantine_s = float(config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_PORT_QUARANTINE_S"])
    assert most + quarantine_s < PORTS_OF_A_SERVICE


@pytest.mark.parametrize("path", [*CONFIGS, CLUSTER], ids=str)
def test_the_launcher_waits_as_long_as_serve_for_running_requests(path: Path) -> None:
    config = load(path)
    (deployment,) = config["applications"][0]["deployments"]
    for limit_s in (deployment["graceful_shutdown_timeout_s"], 300):
        deployment["graceful_shutdown_timeout_s"] = limit_s
        assert drain_limit_s(config) > limit_s
    del deployment["graceful_shutdown_timeout_s"]
    assert drain_limit_s(config) > DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S
    assert drain_limit_s({}) == drain_limit_s(config)


def test_an_unknown_argument_of_the_application_is_refused() -> None:
    with pytest.raises(ValidationError, match="modle"):
        AppArgs.model_validate({"modle": "models/stories-8m"})

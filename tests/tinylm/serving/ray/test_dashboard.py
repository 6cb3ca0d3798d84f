"""Requests to Ray's dashboard: with Ray's token, without proxies, and with one line if the token is wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from helpers.http import json_server
from ray._raylet import AuthenticationTokenLoader

from loadtest.bench.services import with_own_ports
from tinylm.serving.ray import launch
from tinylm.serving.ray.dashboard import TokenRefused, applications, check_token, deploy, token_of
from tinylm.serving.ray.server import Server

SERVED = {"applications": {"tinylm": {"status": "RUNNING", "message": ""}}}
VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home directory. No variable of Ray's token is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "variables", ["", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH"]
)
@pytest.mark.parametrize("in_home", [True, False])
def test_the_token_is_the_one_that_ray_finds(
    variables: str, in_home: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("\t in-a-file \r\nanother line\n")
    values = {"RAY_AUTH_TOKEN": " in-a-variable\n", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    for name in variables.split():
        monkeypatch.setenv(name, values[name])
    if in_home:
        (home / ".ray").mkdir(parents=True)
        (home / ".ray" / "auth_token").write_text("in-the-home\n")
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        environment = dict(os.environ)
        has_token = loader.has_token(ignore_auth_mode=True)
        assert token_of(environment) == (loader.get_raw_token(ignore_auth_mode=True) if has_token else None)
        assert has_token == (in_home or bool(variables))
        assert token_of({**environment, "RAY_AUTH_MODE": "disabled"}) is None
    finally:
        loader.reset_cache()


def test_requests_carry_the_token_and_use_no_proxy(dead_proxies: None) -> None:
    environment = {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN": "secret"}
    with json_server(SERVED, token="secret") as (url, accepted):
        assert applications(url, environment) == [SERVED["applications"]["tinylm"]]
        deploy(url, environment, {"applications": []})
        assert [(method, json.loads(body or "0")) for method, body in accepted] == [
            ("GET", 0), ("PUT", {"applications": []})
        ]  # fmt: skip
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {**environment, "RAY_AUTH_TOKEN": "another"}):
            with pytest.raises(TokenRefused, match=r"refuses requests \(40[13], .*RAY_AUTH_TOKEN_PATH") as caught:
                applications(url, wrong)
            assert "another" not in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_refused_token_ends_the_start_at_once() -> None:
    with json_server(SERVED, token="secret") as (url, _):
        says = f"import sys, time; print('View the dashboard at {url}', file=sys.stderr, flush=True); time.sleep(60)"
        server = Server([sys.executable, "-c", says], {"RAY_AUTH_MODE": "disabled"})
        try:
            with pytest.raises(TokenRefused):
                server.wait_until_ready("localhost:1", 60)
        finally:
            server.process.kill()
            server.process.wait()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAY_AUTH_MODE": "tokens"}, "RAY_AUTH_MODE is 'tokens': it must be one of token, disabled"),
        ({"RAY_AUTH_TOKEN": " "}, "RAY_AUTH_TOKEN has no token"),
        ({"RAY_AUTH_TOKEN": "tök"}, "RAY_AUTH_TOKEN has no token"),
        ({"RAY_AUTH_TOKEN_PATH": "/missing"}, "/missing, which RAY_AUTH_TOKEN_PATH names, has no token"),
        ({"HOME": ""}, "there is no token in .ray/auth_token"),
        ({"HOME": "/dev/null"}, "there is no token in /dev/null/.ray/auth_token"),
    ],
    ids=str,
)
def test_a_start_without_a_usable_token_is_refused_in_one_line(
    variables: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, *_ = with_own_ports(Path("configs/serve.yaml"), tmp_path)
    for name, value in {"RAY_AUTH_MODE": "token", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        launch.launch(config, 1.0)
    assert "\n" not in str(caught.value)


def test_joining_a_cluster_needs_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes a token for a cluster of its own, but not for one that runs."""
    config, *_ = with_own_ports(Path("configs/serve.yaml"), tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_ADDRESS", "ray://cluster:1")
    with pytest.raises(
        ValueError, match=r"there is no token in .*/\.ray/auth_token: run `ray get-auth-token --generate`"
    ):
        launch.launch(config, 1.0)


def test_a_bad_token_does_no_harm_where_none_is_needed() -> None:
    for environment in ({"RAY_AUTH_TOKEN": " "}, {"RAY_AUTH_TOKEN": " ", "RAY_AUTH_MODE": "disabled"}):
        check_token(environment, joins_cluster=False)
    with pytest.raises(ValueError, match="RAY_AUTH_TOKEN has no token"):
        check_token({"RAY_AUTH_TOKEN": " "}, joins_cluster=True)
    check_token({"HOME": "/nowhere"}, joins_cluster=True)  # that cluster may need none

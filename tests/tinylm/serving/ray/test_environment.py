"""What `tinylm serve` gives Ray and HAProxy, so that several services and accounts can share a machine."""

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.serving.ray import environment, haproxy


def test_haproxys_files_lie_in_a_private_directory() -> None:
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        paths = {Path(variables[name]) for name in environment.HAPROXY_FILES}
        directory = Path(variables["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
        assert {path if path == directory else path.parent for path in paths} == {directory}
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "node").mkdir()
    assert not directory.exists()


def test_services_on_other_ports_share_nothing() -> None:
    with (
        environment.service_environment(9000, 16, has_haproxy=True) as first,
        environment.service_environment(9001, 16, has_haproxy=True) as second,
    ):
        names = [*environment.HAPROXY_FILES, *(name for name in first if "DIRECT_INGRESS" in name)]
        assert len(names) == 9
        assert [name for name in names if first[name] == second[name]] == []
        for kind in environment.REPLICA_PORTS:
            last = int(first[f"RAY_SERVE_DIRECT_INGRESS_MAX_{kind}_PORT"])
            assert last < int(second[f"RAY_SERVE_DIRECT_INGRESS_MIN_{kind}_PORT"])


def test_a_port_of_another_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setitem(environment.HAPROXY_PORTS, "RAY_SERVE_HAPROXY_METRICS_PORT", taken)
        with environment.service_environment(9000, 16, has_haproxy=True) as variables:
            assert int(variables["RAY_SERVE_HAPROXY_METRICS_PORT"]) != taken


def test_the_users_variables_override_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "1234")
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        assert variables["RAY_SERVE_HAPROXY_STATS_PORT"] == "1234"


def test_a_temporary_directory_with_a_long_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "ä" * 50)
    with pytest.raises(ValueError, match=r"bytes too many .* set RAY_TMPDIR to a shorter path"):
        environment.check_temporary_directory()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    environment.check_temporary_directory()


@pytest.mark.parametrize("files", [300, 1024])
def test_too_few_open_files_are_one_line(files: int) -> None:
    program = "from tinylm.serving.ray.environment import check_open_files as f; f()"
    python = [sys.executable, "-c", program]
    result = subprocess.run(
        ["prlimit", f"--nofile={files}:{files}", *python], capture_output=True, text=True, check=False
    )
    connections = haproxy.allowed_connections(files)
    last = result.stderr.splitlines()[-1]
    if files == 300:
        gives = (
            f"the limit of open files is 300, which gives HAProxy {connections} connections of the 100 that it needs"
        )
        assert last == f"ValueError: {gives}: raise the hard limit (`ulimit -Hn`)"
    else:
        assert last == f"HAProxy accepts {connections} connections at once, because the limit of open files is 1024"

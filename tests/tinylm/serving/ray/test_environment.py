"""What `tinylm serve` gives Ray and HAProxy, so that several services and accounts can share a machine."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.places import Place
from ray.serve._private import constants

from tinylm.serving.ray import environment, haproxy

ROOT = Path(__file__).resolve().parents[4]


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
        ports = [name for name in first if "DIRECT_INGRESS" in name or "FALLBACK" in name]
        names = [*environment.HAPROXY_FILES, *ports]
        assert len(names) == 11
        assert [name for name in names if first[name] == second[name]] == []
        for kind in environment.REPLICA_PORTS:
            last = int(first[f"RAY_SERVE_DIRECT_INGRESS_MAX_{kind}_PORT"])
            assert last < int(second[f"RAY_SERVE_DIRECT_INGRESS_MIN_{kind}_PORT"])


RESTARTS = """
import time
from ray.serve._private.common import RequestProtocol
from ray.serve._private.node_port_manager import NodePortManager

now = time.monotonic()
time.monotonic = lambda: now
manager = NodePortManager("node")
for number in range(720):
    for protocol in (RequestProtocol.HTTP, RequestProtocol.GRPC):
        port = manager.allocate_port(f"replica-{number}", protocol)
        manager.release_port(f"replica-{number}", port, protocol)
    now += 5
"""


def test_a_replica_that_fails_every_five_seconds_gets_a_port_for_an_hour() -> None:
    """Serve keeps the port of an ended replica back for a while, and a service has only 100 ports."""
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        subprocess.run([sys.executable, "-c", RESTARTS], env=variables, check=True)


def test_a_port_of_another_program_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setitem(environment.METRICS_PORTS, "RAY_SERVE_HAPROXY_METRICS_PORT", taken)
        with environment.service_environment(9000, 16, has_haproxy=True) as variables:
            assert int(variables["RAY_SERVE_HAPROXY_METRICS_PORT"]) != taken


def test_the_users_variables_override_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "1234")
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        assert variables["RAY_SERVE_HAPROXY_STATS_PORT"] == "1234"


def test_serve_reads_every_variable() -> None:
    """Serve ignores a misspelt variable."""
    source = Path(constants.__file__).read_text(encoding="utf-8")
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        names = [name for name in variables if name.startswith("RAY_SERVE_") and name not in os.environ]
    assert "RAY_SERVE_HAPROXY_METRICS_PORT" in names
    assert [name for name in names if f'"{name}"' not in source] == []


@pytest.mark.parametrize("name", ["ä" * 50, "with a space", "a#b"])
def test_haproxys_files_do_not_lie_in_an_odd_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HAProxy's config would end a path at a space, and a socket has a short path."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        assert Path(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent.parent == Path("/tmp")


def test_a_temporary_directory_with_a_long_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("ä" * 50)))
    with pytest.raises(ValueError, match=r"bytes too many .* set RAY_TMPDIR to a shorter path"):
        environment.check_ray_directory()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/1")
    with pytest.raises(ValueError, match=r"cannot create /proc/1/ray .* set RAY_TMPDIR to another directory"):
        environment.check_ray_directory()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    environment.check_ray_directory()


@pytest.mark.parametrize(
    "path", ["/home/me/My Projects/.venv/bin/python", "/a/$b/python", "/a;b/python", "/a'b/python"]
)
def test_a_path_of_python_that_ray_cannot_start_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes the path into a command line of the shell, without quotes."""
    monkeypatch.setattr(sys, "executable", path)
    with pytest.raises(ValueError, match=r"spaces or special characters\. Move TinyLM and its \.venv") as caught:
        environment.check_python()
    assert path in str(caught.value)
    monkeypatch.setattr(sys, "executable", "/home/zoë/tïny-lm_2/.venv/bin/python")
    environment.check_python()


def test_the_page_names_the_lengths_of_paths() -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    assert f"a path of at most {environment.MAX_HAPROXY_DIRECTORY} bytes" in page
    assert f"Ray's sockets allow {environment.MAX_SOCKET_PATH - len(environment.RAY_SOCKET)} bytes" in page


IN_PLACE = """
import sys
from tinylm.terminal.output import one_line_errors
from tinylm.serving.ray.environment import service_environment
with one_line_errors(ValueError), service_environment(9000, 16, has_haproxy=True) as variables:
    print(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"])
"""


@pytest.mark.parametrize("named", [["TMPDIR"], ["RAY_TMPDIR"], []], ids=" ".join)
def test_a_read_only_system_needs_one_writable_directory(named: list[str], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as writable:
        place = Place(Path(writable))
        variables = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "RAY_TMPDIR")}
        variables |= {"PYTHONPATH": str(ROOT), **dict.fromkeys(named, writable)}
        command = place.command(sys.executable, "-c", IN_PLACE)
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=600)
    (line,) = (result.stdout + result.stderr).splitlines()
    if named == []:
        assert result.returncode == 1
        assert line.startswith("error: the temporary directory is /tmp, and this account cannot create /tmp/ray")
        assert line.endswith("set RAY_TMPDIR to another directory")
    else:
        assert (result.returncode, Path(line).parent.parent) == (0, Path(writable))


def test_the_environments_proxies_are_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org, localhost")
    with environment.service_environment(9000, 16, has_haproxy=True) as variables:
        assert variables["no_proxy"] == variables["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"


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

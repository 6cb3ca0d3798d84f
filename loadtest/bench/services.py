"""Start the services to measure on free ports, yield their addresses, and stop them."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

MODEL = Path("models/stories-8m")
START_LIMIT_S = 600  # seconds, also on a machine whose cores are all in use
STOP_LIMIT_S = 60


class RayService(NamedTuple):
    """A service that runs in a Ray session of its own. All its processes have `environment` in theirs."""

    config: Path
    grpc_port: int
    http_port: int
    directory: Path  # Ray's files
    log: Path
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """Of gRPC."""
        return f"localhost:{self.grpc_port}"


@contextmanager
def ray_serve(config: Path, replicas: int) -> Iterator[str]:
    """Run `tinylm serve` in a new Ray session, with free ports and this number of replicas. Yield its address."""
    with ray_service(config, replicas) as service:
        yield service.address


@contextmanager
def ray_http(config: Path, replicas: int) -> Iterator[str]:
    """Do the same as `ray_serve`. Yield the URL of the HTTP API."""
    with ray_service(config, replicas) as service:
        yield f"http://localhost:{service.http_port}"


@contextmanager
def ray_service(config: Path, replicas: int, tree: Path | None = None) -> Iterator[RayService]:
    """Do the same as `ray_serve`. Yield what is needed to find the service's parts.

    tree: the checkout whose code serves; None is this one.
    """
    with tempfile.TemporaryDirectory(prefix="lt-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        path, grpc_port, http_port = with_own_ports(config, Path(directory), replicas)
        command = ["-m", "tinylm.cli", "serve", "--config", str(path), "--wait-s", str(START_LIMIT_S)]
        log, own = Path(directory) / "log", {"RAY_TMPDIR": directory}
        code = {"PYTHONPATH": str(tree)} if tree else {}
        with _process(command, log, "TinyLM is ready", {**own, **code, "PYTHONUNBUFFERED": "1"}, tree):
            yield RayService(path, grpc_port, http_port, Path(directory), log, own)


@contextmanager
def bare(processes: int) -> Iterator[str]:
    """Run the engine behind grpc.aio alone. The processes share a port."""
    port = free_ports(1)[0]
    command = ["-m", "loadtest.bench.bare_server", "--port", str(port), "--model", str(MODEL)]
    with tempfile.TemporaryDirectory(prefix="lt-") as directory, ExitStack() as stack:
        for i in range(processes):
            log = Path(directory) / f"log-{i}"
            stack.enter_context(_process(command, log, "ready on"))
        yield f"localhost:{port}"


@contextmanager
def engine() -> Iterator[str]:
    """Run no server: the processes of the load generator contain the engine."""
    yield f"engine:{MODEL}"


@contextmanager
def llama(threads: int) -> Iterator[str]:
    """Run llama-cpp-python's server with a model of TinyLM's shape. It decodes one request at a time."""
    from loadtest.bench.peers.gguf_file import write_random_model

    with tempfile.TemporaryDirectory(prefix="lt-") as directory:
        path = write_random_model(Path(directory), MODEL)
        port = free_ports(1)[0]
        settings = {
            "model": path, "host": "127.0.0.1", "port": port, "n_ctx": 256, "n_threads": threads,
            "n_threads_batch": threads, "logits_all": "false", "flash_attn": "true", "verbose": "false",
            "interrupt_requests": "false",  # otherwise a new request ends the one that is being answered
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        command = ["-m", "llama_cpp.server", *options]
        with _process(command, Path(directory) / "log", "Uvicorn running on"):
            yield f"http://127.0.0.1:{port}"


def free_ports(count: int) -> list[int]:
    """Return ports below the system's own range and outside the one that Ray gives its workers (10002-19999)."""
    ports: list[int] = []
    for port in random.sample(range(20000, 30000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports between 20000 and 30000")


def with_own_ports(config: Path, directory: Path, replicas: int | None = None) -> tuple[Path, int, int]:
    """Write the config into the directory with free ports, so that it runs beside another service.

    replicas: None keeps their number. Returns the path, the gRPC port and the HTTP port.
    """
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    grpc_port, http_port, metrics_port, stats_port = free_ports(4)
    values["grpc_options"]["port"] = grpc_port
    values["http_options"]["port"] = http_port
    if "controller_options" in values:
        values["controller_options"]["runtime_env"]["env_vars"] |= {
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        }
    if replicas is not None:
        for deployment in values["applications"][0]["deployments"]:
            deployment["num_replicas"] = replicas
    path = directory / config.name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path, grpc_port, http_port


@contextmanager
def _process(
    command: Sequence[str], log: Path, ready: str, environment: Mapping[str, str] = {}, directory: Path | None = None
) -> Iterator[None]:
    """Run Python with these arguments until the end of the block, which begins when its output contains `ready`.

    directory: where it runs; None is the current one.
    Raises RuntimeError with the end of its output if it does not become ready in time.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment},
            start_new_session=True,  # so that Ctrl-C reaches only this process, which interrupts the new one below
        )
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while ready not in log.read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    end = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(
                        f"python {' '.join(command[:3])} did not become ready; the end of its output:\n{end}"
                    )
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

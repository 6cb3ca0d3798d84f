"""`make monitor`: start Prometheus, and Grafana if it is installed, for the service on this machine.

    python -m tinylm.serving.ray.monitor

They run until Ctrl-C, with the files of configs/monitoring, on loopback and on the ports that Ray's dashboard expects.
Neither program comes with TinyLM: docs/operate.md says how to install them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
import yaml

from tinylm.serving.ray.environment import ray_directory
from tinylm.system.text_files import read_text

CONFIG = Path("configs/monitoring/prometheus.yml")
DISCOVERY_FILE = "prom_metrics_service_discovery.json"  # Ray's list of what to scrape
INSTALL_PROMETHEUS = "`sudo apt-get install prometheus` on Debian and Ubuntu, `brew install prometheus` on macOS"


def main(
    config: Annotated[
        Path, typer.Option(help="Prometheus's configuration, beside the alerts and Grafana's files.")
    ] = CONFIG,
    data: Annotated[Path, typer.Option(help="Directory for the data of both.")] = Path("runs/monitoring"),
    prometheus_port: Annotated[int, typer.Option(help="Another port needs RAY_PROMETHEUS_HOST for Ray.")] = 9090,
    grafana_port: Annotated[int, typer.Option(help="Another port needs RAY_GRAFANA_HOST for Ray.")] = 3000,
) -> None:
    """Start Prometheus and Grafana for the service on this machine: python -m tinylm.serving.ray.monitor"""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts a background job with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="tinylm-monitor-") as directory:
        try:
            written = write_config(config, Path(directory))
            processes["Prometheus"] = start_prometheus(written, data, prometheus_port)
            print(f"Prometheus: http://localhost:{prometheus_port}/alerts", flush=True)
            if (grafana := grafana_command()) is None:
                print("Grafana is not installed (see docs/operate.md): use the graphs of Prometheus", flush=True)
            else:
                processes["Grafana"] = start_grafana(grafana, config.parent, data, prometheus_port, grafana_port)
                print(f"Grafana:    http://localhost:{grafana_port}/d/tinylm", flush=True)
            while True:
                for name, process in processes.items():
                    if process.poll() is not None:
                        raise ValueError(f"{name} has ended: see its messages above")
                time.sleep(0.5)
        except ValueError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:
            pass
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait()


def write_config(config: Path, directory: Path) -> Path:
    """Write Prometheus's configuration to `directory`, with absolute paths and this environment's Ray directory."""
    if not config.is_file():
        raise ValueError(f"no Prometheus configuration at {config}: run this from TinyLM's own directory")
    values = yaml.safe_load(read_text(config))
    values["rule_files"] = [str((config.parent / name).resolve()) for name in values["rule_files"]]
    for job in values["scrape_configs"]:
        for discovery in job.get("file_sd_configs", []):
            discovery["files"] = [str(Path(ray_directory(), "ray", DISCOVERY_FILE))]
    written = directory / config.name
    written.write_text(yaml.safe_dump(values), encoding="utf-8")
    return written


def start_prometheus(config: Path, data: Path, port: int) -> subprocess.Popen[bytes]:
    """Start Prometheus on loopback. Raise ValueError when it is not installed, or its port is in use."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise ValueError(f"no `prometheus` on the PATH: install it with {INSTALL_PROMETHEUS}")
    _check_port("--prometheus-port", port, "Debian's package starts one: sudo systemctl disable --now prometheus")
    data.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={data / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ],
        start_new_session=True,  # Ctrl-C must reach only this process, which then stops Prometheus
    )


def grafana_command() -> list[str] | None:
    """Return the command that starts Grafana's server, with its home directory, or None if it is not installed."""
    for name, arguments in (("grafana", ["server"]), ("grafana-server", [])):
        if binary := shutil.which(name):
            root = Path(binary).resolve().parent.parent
            homes = [root, root / "share/grafana", Path("/usr/share/grafana")]
            home = next((home for home in homes if (home / "conf/defaults.ini").is_file()), None)
            return [binary, *arguments, *([f"--homepath={home}"] if home else [])]
    return None


def start_grafana(
    command: list[str], configs: Path, data: Path, prometheus_port: int, port: int
) -> subprocess.Popen[bytes]:
    """Start Grafana on loopback, with the dashboards of TinyLM and Ray. Reading and embedding need no login."""
    _check_port("--grafana-port", port, "perhaps a Grafana that runs as a service")
    settings = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str((data / "grafana").resolve()),
        "GF_PATHS_PROVISIONING": str((configs / "grafana").resolve()),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_SECURITY_ALLOW_EMBEDDING": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_LOG_LEVEL": "warn",
        "TINYLM_PROMETHEUS_URL": f"http://localhost:{prometheus_port}",
        "TINYLM_DASHBOARD": str((configs / "grafana-dashboard.json").resolve()),
        "TINYLM_RAY_DASHBOARDS": str(Path(ray_directory(), "ray/session_latest/metrics/grafana/dashboards")),
    }
    return subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True)


def _check_port(option: str, port: int, hint: str) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ValueError(f"{option} is {port}: that port is in use ({hint})")


if __name__ == "__main__":
    typer.run(main)

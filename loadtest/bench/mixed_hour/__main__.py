"""Run mixed load on a service for an hour, disturb it, and report the outcomes and the memory of each of its processes.

    python -m loadtest.bench.mixed_hour --out docs/results/mixed-hour.json

The load makes each kind of call of `calls` at a constant rate. `disturbances` changes the service meanwhile. Each
minute the command prints a line and writes the result: the summary to FILE.json, the samples of all processes to
FILE.csv.
It fails if any call has an outcome that is not expected.
"""

from __future__ import annotations

import csv
import io
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer
import yaml

from loadtest.bench import services
from loadtest.bench.mixed_hour import memory
from loadtest.bench.mixed_hour.calls import KINDS, Caller, Keys
from loadtest.bench.mixed_hour.disturbances import REPLICAS, Disturbances, exporters
from loadtest.bench.mixed_hour.load import Account, Load
from loadtest.options import require_at_least
from tinylm.serving.keys import make_key
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import one_line_errors, say

CONFIG = Path("configs/serve.yaml")
PERIOD_MIN = 6.0  # each has all disturbances
FEW_REQUESTS, FEW_TOKENS = 30, 500  # of the limited keys, per minute


@contextmanager
def running() -> Iterator[tuple[services.RayService, Caller, Path]]:
    """Start a service with a key file. Yield it, a caller with the keys, and the key file."""
    with tempfile.TemporaryDirectory(prefix="lt-") as directory:
        made = [
            make_key("free"),
            make_key("few-requests", requests_per_minute=FEW_REQUESTS),
            make_key("few-tokens", tokens_per_minute=FEW_TOKENS),
        ]
        key_file, config = Path(directory, "keys.txt"), Path(directory, "serve.yaml")
        key_file.write_text("".join(f"{line}\n" for _, line in made), encoding="utf-8")
        values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        values["applications"][0]["args"]["api_keys"] = str(key_file)
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        with services.ray_service(config, REPLICAS) as service:
            own = yaml.safe_load(service.config.read_text(encoding="utf-8"))
            port = own["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_HAPROXY_METRICS_PORT"]
            keys = Keys(*(key for key, _ in made))
            caller = Caller(service.address, service.http_port, int(port), keys, lambda: exporters(service.directory))
            yield service, caller, key_file


def run(minutes: int, rate_per_s: float, period_min: float, out: Path | None) -> dict[str, Any]:
    """Run the load, and return the result. Write it each minute if `out` is a path."""
    settings = {"minutes": minutes, "calls_per_s": rate_per_s, "period_min": period_min, "replicas": REPLICAS}
    origin = {**describe(), "command": "python -m loadtest.bench.mixed_hour", "settings": settings}
    with running() as (service, caller, key_file):
        taken = memory.samples(0, service.environment)
        with Load(caller, KINDS, rate_per_s) as load:
            began = time.monotonic()
            with Disturbances(service, caller, load, key_file, period_min * 60) as disturbances:
                for minute in range(1, minutes + 1):
                    time.sleep(max(0.0, began + minute * 60 - time.monotonic()))
                    taken += memory.samples(minute, service.environment)
                    result = {**origin, "minutes": minute, **_result(load, caller, disturbances, taken)}
                    say(_line(minute, load, taken))
                    if out is not None:
                        _write(out, result, taken)
        result = {**origin, "minutes": minutes, **_result(load, caller, disturbances, taken)}
        if out is not None:
            _write(out, result, taken)
    return result


def _result(load: Load, caller: Caller, disturbances: Disturbances, taken: list[memory.Sample]) -> dict[str, Any]:
    table = load.table()
    return {
        "calls": {outcome: load.total(outcome) for outcome in get_args(Account)},
        "unexpected": load.total("unexpected"),
        "retried_by_client": caller.n_retried,
        "memory": memory.summary(taken),
        "kinds": table,
        "events": list(disturbances.events),
        "examples": list(load.examples),
    }


def _line(minute: int, load: Load, taken: list[memory.Sample]) -> str:
    now = [sample for sample in taken if sample.minute == minute]
    roles = {role: [s.anonymous_kib for s in now if s.role == role] for role in dict.fromkeys(s.role for s in now)}
    shown = ("replica", "HAProxy", "proxy actor", "controller", "dashboard agent", "GCS", "raylet")
    sizes = ", ".join(f"{role} {sum(roles[role]) / len(roles[role]) / 1024:.1f}" for role in shown if role in roles)
    failed = f"{load.total('unexpected')} unexpected, {load.total('ended by a kill')} ended by a kill"
    return f"minute {minute}: {load.total('ok')} ok, {load.total('refused')} refused, {failed}; MiB: {sizes}"


def _write(out: Path, result: dict[str, Any], taken: list[memory.Sample]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(field.name for field in fields(memory.Sample))
    writer.writerows(astuple(sample) for sample in taken)
    write_file(out.with_suffix(".csv"), table.getvalue())
    write_file(out, json.dumps(result, indent=2) + "\n")


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    minutes: Annotated[int, typer.Option(help="Minutes of load.")] = 60,
    rate: Annotated[float, typer.Option(help="Calls per second.")] = 8.0,
) -> None:
    """Run mixed load on a service that is disturbed meanwhile, and report outcomes and memory."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts a background job with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    with one_line_errors(RuntimeError):
        require_at_least(1, minutes=minutes, rate=rate)
        if out is not None:
            check_file(out)
            check_file(out.with_suffix(".csv"))
        result = run(minutes, rate, min(PERIOD_MIN, minutes), out)
    say(json.dumps({name: result[name] for name in ("calls", "memory")}))
    if result["unexpected"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

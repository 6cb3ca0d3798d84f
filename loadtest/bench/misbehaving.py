"""Measure what misbehaving clients cost others: the errors, requests/s and p99 of 16 streaming clients.

    python -m loadtest.bench.misbehaving --out docs/results/misbehaving.json

Eight of the 16 clients use gRPC and eight use HTTP. For each kind of misbehaving client, they work for four windows of
time: without it, with it, with it, without it. After that, it comes once more alone, to see whether slots are released
while its connections are still open.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Optional

import numpy as np
import psutil
import typer

from loadtest.bench import services
from loadtest.bench.misbehaving_clients import CLIENTS, Place
from loadtest.generator.call_record import CallRecord
from loadtest.generator.process_pool import ProcessPool
from loadtest.load import Load, Mix
from loadtest.measured_server import find, role
from loadtest.options import names_that_begin, require_at_least
from loadtest.results import histogram
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import one_line_errors, say

CONFIG = Path("configs/serve.yaml")
REPLICAS, CLIENTS_OF_A_PROTOCOL, TOKENS = 4, 8, 32
WITH = (False, True, True, False)  # whether the misbehaving client is there, in each window
WARMUP_S, ALONE_S, RELEASE_LIMIT_S = 2.0, 2.0, 60.0
NOBODY = "nobody"  # four windows without a misbehaving client, which show the noise
_LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Service:
    """The running service, and one pool of processes for each protocol of the well-behaved clients."""

    grpc_port: int
    http_port: int
    pools: dict[str, ProcessPool]  # by the address for the load generator

    def requests_in_slots(self) -> int:
        """Return the number of requests that hold a slot, or wait for one, in all replicas."""
        with _LOOPBACK.open(f"http://localhost:{self.http_port}/live", timeout=RELEASE_LIMIT_S) as response:
            return sum(replica["running"] + replica["waiting"] for replica in json.load(response)["replicas"])

    def memory_mib(self) -> dict[int, tuple[str, float]]:
        """Return role and private memory in MiB of each replica and of HAProxy, by process id."""
        found = {}
        for process in find(f"localhost:{self.grpc_port}")[0]:
            with suppress(psutil.Error, AttributeError):  # it has ended
                name = "haproxy" if process.name() == "haproxy" else role(process)
                memory = process.memory_info()
                found[process.pid] = (name, (memory.rss - memory.shared) / 2**20)
        return {pid: value for pid, value in found.items() if value[0] in ("replicas", "haproxy")}


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each of the four windows.")] = 9.0,
    only: Annotated[Optional[str], typer.Option(help="Beginnings of the kinds to measure, with commas.")] = None,
) -> None:
    """Measure what each kind of misbehaving client costs 16 streaming clients."""
    with one_line_errors(ValueError, RuntimeError):
        require_at_least(1, seconds=seconds)
        if out:
            check_file(out)
        names = names_that_begin("--only", only, [NOBODY, *CLIENTS])
        with (
            services.ray_service(CONFIG, REPLICAS) as ray,
            ProcessPool() as of_grpc,
            ProcessPool() as of_http,
        ):
            pools = {ray.address: of_grpc, f"http://localhost:{ray.http_port}": of_http}
            service = Service(ray.grpc_port, ray.http_port, pools)
            well_behaved(service, WARMUP_S, lambda begin: None)  # starts the processes, and fills caches
            found = {name: measure(service, name, seconds) for name in names}
    settings = {
        "replicas": REPLICAS,
        "clients": dict.fromkeys(("grpc", "http"), CLIENTS_OF_A_PROTOCOL),
        "tokens": TOKENS,
        "window_s": seconds,
        "with": WITH,
    }
    result = {"command": "python -m loadtest.bench.misbehaving", "settings": settings, "misbehaving": found}
    if out:
        write_file(out, json.dumps({**describe(), **result}, indent=2) + "\n")


def measure(service: Service, name: str, seconds: float) -> dict[str, Any]:
    """Return the figures of the well-behaved clients in each window, their ratios, and what was released."""
    place = Place(service.grpc_port, service.http_port)
    before = service.memory_mib()

    def misbehave(begin: float) -> None:
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        with misbehaving(name, place):
            time.sleep(max(0.0, begin + 3 * seconds - time.monotonic()))

    calls = well_behaved(service, len(WITH) * seconds, misbehave)
    windows = [
        {
            "with": is_with,
            **figures([call for call in calls if i * seconds <= call.ended_at < (i + 1) * seconds], seconds),
        }
        for i, is_with in enumerate(WITH)
    ]
    released = release(service, name)
    grown = growth(before, service.memory_mib())
    ratios = {}
    for key in ("requests_per_s", "p99_ms"):
        there, absent = (fmean(w[key] for w in windows if w["with"] == is_with) for is_with in (True, False))
        ratios[f"{key.removesuffix('_ms').removesuffix('_per_s')}_ratio"] = round(there / absent, 3)
    errors = sum(window["errors"] for window in windows)
    say(f"{name}: {errors} errors, requests/s x {ratios['requests_ratio']}, p99 x {ratios['p99_ratio']}")
    return {
        "windows": windows,
        "errors": errors,
        **ratios,
        "its_outcomes": dict(place.outcomes),
        "requests_left": released[0],
        "released_s": released[1],
        "memory_growth_mib": grown,
    }


@contextmanager
def misbehaving(name: str, place: Place) -> Iterator[None]:
    """Run the misbehaving client of this name in a thread during the block. Raise its error, if it has one."""
    if name == NOBODY:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(CLIENTS[name], place)
        try:
            yield
        finally:
            place.ended.set()
        client.result()


def well_behaved(service: Service, seconds: float, meanwhile: Callable[[float], None]) -> list[CallRecord]:
    """Run all well-behaved clients. Return their calls, with times in seconds from the begin of the measured time.

    meanwhile: called with that begin, in seconds of `time.monotonic()`.
    """
    begins: dict[str, float] = {}
    both = threading.Barrier(len(service.pools) + 1)

    def run(address: str, pool: ProcessPool) -> list[CallRecord]:
        load = Load(
            address,
            Mix.parse(str(TOKENS), "tokens"),
            concurrency=CLIENTS_OF_A_PROTOCOL,
            stream=True,
            ignore_eos=True,
            duration_s=seconds + 1,
            warmup_s=WARMUP_S,
        )

        def on_begin(begin: float) -> None:
            begins[address] = begin
            both.wait(RELEASE_LIMIT_S)

        done = pool.run(load, 1, on_begin, lambda tick: None, lambda: None)
        return [record for process in done for record in process.records]

    with ThreadPoolExecutor(len(service.pools)) as threads:
        runs = {address: threads.submit(run, address, pool) for address, pool in service.pools.items()}
        both.wait(RELEASE_LIMIT_S)
        begin = max(begins.values())
        meanwhile(begin)
        return [record.since(begin - begins[address]) for address, done in runs.items() for record in done.result()]


def figures(calls: Sequence[CallRecord], seconds: float) -> dict[str, float]:
    """Return requests/s, p50 and p99 in ms of the complete streams that ended in a window, and the number of others.

    Raises RuntimeError if no stream is complete.
    """
    ok = np.array([call.latency_s for call in calls if call.status == "OK"])
    if not len(ok):
        raise RuntimeError(f"no stream was complete within {seconds} s: give a larger number for --seconds")
    latency = histogram.figures(histogram.of_seconds(ok))
    return {
        "requests_per_s": round(len(ok) / seconds, 2),
        "p50_ms": latency["p50"],
        "p99_ms": latency["p99"],
        "errors": len(calls) - len(ok),
    }


def release(service: Service, name: str) -> tuple[int, float]:
    """Return the requests that hold or await a slot although only this client is there, and how long that took to end.

    The client stays, with its connections open, until all slots are free or the limit has passed.
    """
    place = Place(service.grpc_port, service.http_port)
    with misbehaving(name, place):
        time.sleep(ALONE_S)
        began_at = time.monotonic()
        while (left := service.requests_in_slots()) and time.monotonic() - began_at < RELEASE_LIMIT_S:
            time.sleep(0.1)
    return left, round(time.monotonic() - began_at, 1)


def growth(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> dict[str, float]:
    """Return the largest growth of a process in MiB, by role."""
    grown: dict[str, float] = {}
    for pid, (name, memory) in after.items():
        if pid in before:
            grown[name] = round(max(grown.get(name, -1e9), memory - before[pid][1]), 1)
    return grown


if __name__ == "__main__":
    typer.run(main)

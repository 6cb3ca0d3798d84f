"""Measure the load generator on a stub service: its highest rates, and whether it finds known delays.

The stub shares the machine with the load generator, so the rates are what both reach together. Against a service on
another machine the load generator can reach more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from loadtest.load import Load, Mix
from loadtest.results import table
from loadtest.stub_server import running
from loadtest.sweep import Sweep, run_sweep
from tinylm.system.machine import describe

CLIENTS = (1, 8, 32, 128)
TOKENS = Mix((64,), (1.0,))
ONE_TOKEN = Mix((1,), (1.0,))
TOKENS_A_MESSAGE = 8  # of a stream: a busy TinyLM puts at most this number into a message
DELAYS_MS = Mix((10, 40, 160), (0.7, 0.25, 0.05))
OVERHEAD_MS = 25.0  # the most that client, stub and a busy machine may add to a known delay
FREEZE_S = 1.0


def measure(duration_s: float, quiet: bool) -> dict[str, Any]:
    """Return the highest rates and the checks. Each check has a name, what it found, and whether it passed."""
    rates = {kind: _rates(duration_s, stream, quiet) for kind, stream in (("unary", False), ("stream", True))}
    checks = [_known_delays(duration_s, quiet), *_stall(duration_s, quiet)]
    return {**describe(), "rates": rates, "checks": checks}


def _rates(duration_s: float, stream: bool, quiet: bool) -> list[dict[str, Any]]:
    """Return runs against a stub that answers without delay."""
    with running("--tokens-a-message", str(TOKENS_A_MESSAGE)) as server:
        loads = [Load(server, TOKENS, n, stream=stream, duration_s=duration_s, warmup_s=0.5) for n in CLIENTS]
        return run_sweep(Sweep(tuple(loads)), quiet)


def _known_delays(duration_s: float, quiet: bool) -> dict[str, Any]:
    """Check with three known delays that each percentile is the delay that its share gives, or slightly more."""
    with running("--delay-ms", str(DELAYS_MS)) as server:
        load = Load(server, ONE_TOKEN, rate_per_s=100, duration_s=max(duration_s, 5), warmup_s=0.5)
        (run,) = run_sweep(Sweep((load,)), quiet)
    found = {name: run["latency_ms"][name] for name in ("p50", "p90", "p99")}
    expected = dict(zip(found, DELAYS_MS.values, strict=True))
    passed = all(delay <= found[name] < delay + OVERHEAD_MS for name, delay in expected.items())
    return {"name": "known delays", "expected_ms": expected, "found_ms": found, "passed": passed}


def _stall(duration_s: float, quiet: bool) -> list[dict[str, Any]]:
    """Check that latencies from the intended time show a stall, and that latencies from the sending time hide it.

    The service stops for a second. Only one request may be open, so the others wait. About a quarter of the latencies
    from the intended time show the stall. From the sending time only one does: the coordinated omission of naive
    clients.
    """
    duration_s = max(duration_s, 4)
    with running("--freeze-after-s", "2", "--freeze-s", str(FREEZE_S)) as server:
        load = Load(
            server,
            ONE_TOKEN,
            rate_per_s=100,
            arrivals="constant",
            duration_s=duration_s,
            warmup_s=0,
            max_in_flight=1,
        )
        (run,) = run_sweep(Sweep((load,)), quiet)
    # A request intended within the stall waits for half of it on average.
    expected = FREEZE_S / duration_s * FREEZE_S / 2 * 1000
    found, naive = run["latency_ms"], run["latency_from_send_ms"]
    return [
        {
            "name": "a stall of a second, from the intended time",
            "expected_ms": {"mean": round(expected, 1)},
            "found_ms": {name: found[name] for name in ("mean", "p99", "max")},
            "passed": 0.7 * expected < found["mean"] < 1.5 * expected + OVERHEAD_MS,
        },
        {
            "name": "the same requests, from the sending time",
            "expected_ms": {"p90": 0},
            "found_ms": {name: naive[name] for name in ("mean", "p90", "max")},
            "passed": naive["p90"] < OVERHEAD_MS,
        },
    ]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the rates, the highest ones, and the checks."""
    for kind, runs in result["rates"].items():
        table.show(runs, console)
        best = max(runs, key=lambda run: run["requests_per_s"])
        rate = f"{best['requests_per_s']:,.0f} requests/s with {best['load']['concurrency']} clients"
        console.print(f"highest rate, {kind}: {rate}")
    for check in result["checks"]:
        verdict, style = ("passed", "green") if check["passed"] else ("failed", "red")
        text = f"{check['name']}: {verdict}; expected {check['expected_ms']} ms, found {check['found_ms']}"
        console.print(text, style=style)

"""Measure what explanations cost the requests that a service answers at the same time.

    python -m loadtest.bench.explain_cost --out docs/results/explain-cost.json

Clients send requests for text with and without explorers beside them, in the order A B B A. An explorer asks for all
kinds of explanations of one prompt in turn, then of the next prompt. It asks again after its answer, or after the time
that a refusal names.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional

import numpy as np
import typer

from loadtest.bench import services
from loadtest.load import Load, Mix
from loadtest.options import command_errors, require_at_least
from loadtest.sweep import Sweep, run_sweep
from tinylm.client import Client, ServiceError
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import say

CONFIG = Path("configs/serve.yaml")
REPLICAS, CLIENTS, EXPLORERS, TOKENS = 4, 16, 3, 64
WARMUP_S, PAUSE_S = 2.0, 1.0
IDLE_ROUNDS = 20  # explanations of each kind without load
WORDS = ("Once upon a time, there was a little dog who lived in a big house near the forest. " * 3).split()
PIECES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tokens", {}),
    ("norms", {}),
    ("attention", {"layer": 8, "head": 1}),
    ("lens", {}),
    ("scores", {}),
    ("matmul", {"layer": 8, "name": "up"}),
    ("cache", {}),
    ("batch", {}),
)


@dataclass
class Asked:
    """What explorers got."""

    answered_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # piece -> times
    n_refused: int = 0

    def ask(self, client: Client, prompt: str, piece: str, fields: Mapping[str, Any]) -> float:
        """Ask once. Return the seconds to wait before the next question. Raise ServiceError for other failures."""
        began_at = time.monotonic()
        try:
            client.explain(prompt, piece, **fields)
        except ServiceError as error:
            if error.retry_after_s is None:
                raise
            self.n_refused += 1
            return error.retry_after_s
        self.answered_s[piece].append(time.monotonic() - began_at)
        return 0.0

    def add(self, other: Asked) -> None:
        self.n_refused += other.n_refused
        for piece, times in other.answered_s.items():
            self.answered_s[piece] += times

    @property
    def n_answered(self) -> int:
        return sum(map(len, self.answered_s.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, and the times of each piece in ms. "computed" has the pieces of the explaining process."""
        pieces = {piece: self.answered_s[piece] for piece, _ in PIECES if self.answered_s[piece]}
        looked_up = ("tokens", "cache", "batch")
        computed = [one for piece, times in pieces.items() if piece not in looked_up for one in times]
        times = {**pieces, "computed": computed} if computed else pieces
        return {"answered": self.n_answered, "refused": self.n_refused, "ms": {k: _times(v) for k, v in times.items()}}


def _times(times_s: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(np.array(times_s) * 1000, [50, 95])
    return {"answered": len(times_s), "p50": round(float(p50), 1), "p95": round(float(p95), 1)}


@contextmanager
def explorers(address: str, n: int) -> Iterator[Asked]:
    """Run explorers during the block. What they got is complete after it. Raise RuntimeError if one of them failed."""
    ends, asked, failures = threading.Event(), [Asked() for _ in range(n)], list[Exception]()

    def explore(number: int) -> None:
        rounds = ((prompt, *piece) for prompt in prompts(number) for piece in PIECES)
        try:
            with Client(address, retries=0) as client:
                while not ends.is_set():
                    ends.wait(asked[number].ask(client, *next(rounds)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=explore, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    total = Asked()
    try:
        yield total
    finally:
        ends.set()
        for thread in threads:
            thread.join()
        for one in asked:
            total.add(one)
    if failures:
        raise RuntimeError(f"an explorer failed: {failures[0]}")


def prompts(number: int) -> Iterator[str]:
    """Yield an explorer's prompts without end. Each begins one word later than the one before."""
    for first in count(number * len(WORDS) // EXPLORERS):
        first %= len(WORDS)
        yield " ".join(WORDS[first:] + WORDS[:first])


def ask_alone(address: str, rounds: int) -> Asked:
    """Ask for each kind of explanation without load. The first round starts the explaining processes."""
    with Client(address) as client:
        for number, prompt in enumerate(islice(prompts(0), rounds + 1)):
            if number <= 1:
                asked = Asked()
            for piece, fields in PIECES:
                asked.ask(client, prompt, piece, fields)
    return asked


def measure(address: str, seconds: float) -> dict[str, float]:
    """Return the requests per second and the latency of the clients."""
    load = Load(address, Mix((TOKENS,), (1.0,)), CLIENTS, ignore_eos=True, duration_s=seconds, warmup_s=WARMUP_S)
    (run,) = run_sweep(Sweep((load,)), quiet=True)
    latency = run["latency_ms"]
    return {"requests_per_s": run["requests_per_s"], "p50_ms": latency["p50"], "p99_ms": latency["p99"]}


def compare(address: str, pairs: int, seconds: float) -> dict[str, Any]:
    """Return both measurements of each pair, and the ratios of those with explorers to those without."""
    found: list[dict[str, dict[str, float]]] = []
    total = Asked()
    for number in range(pairs):
        pair = {}
        for kind in ("without", "with") if number % 2 == 0 else ("with", "without"):
            with explorers(address, EXPLORERS if kind == "with" else 0) as asked:
                pair[kind] = measure(address, seconds)
            total.add(asked)
            time.sleep(PAUSE_S)
        found.append(pair)
        one = ratios([pair])
        say(
            f"pair {number + 1} of {pairs}: {one['requests_per_s']:.3f} of the requests/s, {one['p99_ms']:.3f} of the "
            f"p99; so far {total.n_answered} explanations answered, {total.n_refused} refused"
        )
    return {"pairs": found, "median_of_ratios": ratios(found), "ratio_of_medians": over_all(found), "loaded": total}


def ratios(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the median over the pairs of each figure with explorers, as a share of that without."""
    names = pairs[0]["with"]
    return {name: round(median(pair["with"][name] / pair["without"][name] for pair in pairs), 4) for name in names}


def over_all(pairs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the median of each figure with explorers, as a share of the median without."""

    def middle(kind: str, name: str) -> float:
        return median(pair[kind][name] for pair in pairs)

    return {name: round(middle("with", name) / middle("without", name), 4) for name in pairs[0]["with"]}


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    pairs: Annotated[int, typer.Option(help="Measurements with and without explorers.")] = 6,
    seconds: Annotated[float, typer.Option(help="Seconds of each measurement.")] = 15.0,
) -> None:
    """Measure the requests/s and the p99 of a loaded service with and without explanations beside them."""
    with command_errors():
        require_at_least(1, pairs=pairs, seconds=seconds)
        if out:
            check_file(out)
        with services.ray_serve(CONFIG, REPLICAS) as address:
            alone = ask_alone(address, IDLE_ROUNDS)
            say(f"without load: {alone.as_dict()['ms']}")
            result = compare(address, pairs, seconds)
    settings = {"replicas": REPLICAS, "clients": CLIENTS, "explorers": EXPLORERS, "tokens": TOKENS, "seconds": seconds}
    result |= {"loaded": result["loaded"].as_dict(), "idle": alone.as_dict()}
    say(json.dumps({"settings": settings, **result}))
    if out:
        facts = {**describe(), "command": "python -m loadtest.bench.explain_cost", "settings": settings}
        write_file(out, json.dumps({**facts, **result}, indent=2) + "\n")


if __name__ == "__main__":  # the processes of the load generator import this module too
    typer.run(main)

"""Measure what one key beyond its limit costs another key: the latency of the second with and without the first.

    python -m loadtest.bench.key_limits --out docs/results/key-limits.json

The key with a limit sends calls at a constant rate, far above its limit, and does not wait when it is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional

import typer
import yaml

from loadtest.bench import services
from loadtest.options import require_at_least
from tinylm import SamplingParams
from tinylm.client import Client, ServiceError
from tinylm.serving.keys import make_key
from tinylm.system.files import check_file, write_file
from tinylm.system.machine import describe
from tinylm.terminal.output import one_line_errors, say

CONFIG = Path("configs/serve.yaml")
REPLICAS, CLIENTS, TOKENS = 2, 8, 32
PER_MINUTE, SENT_PER_S = 60, 20.0  # of the key with a limit: twenty times its limit


@dataclass
class Flood:
    """Sends calls with the limited key, from `start` to `stop`."""

    address: str
    key: str
    n_answered: int = 0
    n_refused: int = 0

    def __post_init__(self) -> None:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        params = SamplingParams(max_tokens=TOKENS)
        with Client(self.address, retries=0, api_key=self.key) as client:
            while not self._ends.wait(1 / SENT_PER_S):
                try:
                    client.generate("Once upon a time", params)
                    self.n_answered += 1
                except ServiceError as error:
                    if error.retry_after_s is None:
                        raise
                    self.n_refused += 1


def wait_as_told(address: str, key: str) -> dict[str, float]:
    """Use up the limit, wait exactly as long as the refusal says, and return how that went."""
    with Client(address, retries=0, api_key=key) as client:
        params = SamplingParams(max_tokens=1)
        while True:
            try:
                client.generate("Once", params)
            except ServiceError as error:
                if error.retry_after_s is None:
                    raise
                told_s = error.retry_after_s
                break
        time.sleep(told_s / 2)
        early = 0
        try:
            client.generate("Once", params)
        except ServiceError:
            early = 1
        time.sleep(told_s / 2)
        client.generate("Once", params)  # raises if the time was too short
    return {"told_s": told_s, "refused_at_half_the_time": early}


def measure(address: str, key: str, seconds: float) -> dict[str, float]:
    """Return the requests per second, and the latency in ms, of the key without a limit."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "run.json")
        subprocess.run(
            [
                sys.executable, "-m", "loadtest", "run", "--server", address, "--api-key", key, "--concurrency",
                str(CLIENTS), "--max-tokens", str(TOKENS), "--ignore-eos", "--duration", str(seconds), "--warmup", "2",
                "--output", str(output),
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (run,) = json.loads(output.read_text(encoding="utf-8"))["runs"]
    latency = run["latency_ms"]
    return {"requests_per_s": run["requests_per_s"], "p50_ms": latency["p50"], "p99_ms": latency["p99"]}


def main(
    out: Annotated[Optional[Path], typer.Option(metavar="FILE.json", help="Write the figures.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each kind, in turn.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each.")] = 10.0,
) -> None:
    """Measure the latency of one key while another key is refused, and without it."""
    with one_line_errors(RuntimeError), tempfile.TemporaryDirectory() as directory:
        require_at_least(1, rounds=rounds, seconds=seconds)
        if out:
            check_file(out)
        limited, free = make_key("limited", requests_per_minute=PER_MINUTE), make_key("free")
        keys = Path(directory, "keys.txt")
        keys.write_text(f"{limited[1]}\n{free[1]}\n", encoding="utf-8")
        config = Path(directory, "serve.yaml")
        values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        values["applications"][0]["args"]["api_keys"] = str(keys)
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        with services.ray_serve(config, REPLICAS) as address:
            told = wait_as_told(address, limited[0])
            result = compare(address, limited[0], free[0], rounds, seconds)
    result = {"told": told, **result}
    say(json.dumps(result))
    if out:
        facts = {**describe(), "command": "python -m loadtest.bench.key_limits"}
        write_file(out, json.dumps({**facts, **result}, indent=2) + "\n")


def compare(address: str, limited: str, free: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Return each measurement of the free key, and the ratio of the median p99 with refused calls and without."""
    alone, beside, floods = [], [], []
    for _ in range(rounds):
        alone.append(measure(address, free, seconds))
        flood = Flood(address, limited)
        flood.start()
        try:
            beside.append(measure(address, free, seconds))
        finally:
            flood.stop()
        floods.append({"answered": flood.n_answered, "refused": flood.n_refused})
        say(f"p99 {alone[-1]['p99_ms']:.1f} ms alone, {beside[-1]['p99_ms']:.1f} ms beside {flood.n_refused} refusals")
    p99 = [median(run["p99_ms"] for run in runs) for runs in (alone, beside)]
    settings = {"replicas": REPLICAS, "clients": CLIENTS, "tokens": TOKENS, "limit_per_minute": PER_MINUTE}
    return {"settings": settings, "alone": alone, "beside": beside, "limited_key": floods, "p99_ratio": p99[1] / p99[0]}


if __name__ == "__main__":
    typer.run(main)

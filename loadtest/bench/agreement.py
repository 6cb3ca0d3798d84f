"""Compare what guidellm, aiperf and this load generator measure of the same load: the median time between tokens.

    python -m loadtest.bench.agreement --server http://localhost:8000 --out docs/results/agreement.json

Each sends the same prompts, streamed over HTTP, and asks for the same number of tokens with `ignore_eos`. They run one
after the other, several times. guidellm and this load generator divide the time after a request's first message by the
tokens after it. aiperf 0.13.0 assumes that the first message has one token, so it reports too low times.
`make clients` installs the other two.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from loadtest.bench.markdown import table
from loadtest.generator.workload import Workload
from loadtest.load import Load, Mix
from loadtest.options import command_errors, require_at_least
from loadtest.results import result_file
from tinylm.system.files import check_file
from tinylm.system.machine import describe
from tinylm.system.proxies import DIRECT, without_proxy_for_loopback

PROGRAMS = Path(".clients").absolute()  # where `make clients` installs
GUIDELLM, AIPERF = PROGRAMS / "guidellm/venv/bin/guidellm", PROGRAMS / "aiperf/venv/bin/aiperf"
TOKENIZER = PROGRAMS / "exports/huggingface"
LIMIT_S = 3600  # for one run of one program
REFERENCE = "loadtest"  # the ratios are to this one


@dataclass(frozen=True)
class Run:
    """One run of one program. It may write into `directory`."""

    url: str
    model: str
    concurrency: int
    max_tokens: int
    prompts: tuple[str, ...]
    directory: Path


def guidellm(run: Run) -> float:
    """Return the median time between tokens in ms, as guidellm reports it."""
    rows = [{"prompt": prompt, "output_tokens_count": run.max_tokens} for prompt in run.prompts]
    backend = {"kind": "openai_http", "target": run.url, "model": run.model, "request_format": "/v1/completions"}
    report = run.directory / "guidellm.json"
    _execute(
        run, GUIDELLM, "run", "--backend", json.dumps(backend),
        "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
        "--data", f"kind=json_file,path={_json_lines(run, rows)}",
        "--profile", f"kind=concurrent,streams={run.concurrency}",
        "--constraint", f"kind=max_requests,count={len(run.prompts)}",
        "--output", f"kind=json,path={report}", "--disable-console-interactive",
    )  # fmt: skip
    metrics = _read(report)["benchmarks"][0]["metrics"]
    return float(metrics["inter_token_latency_ms"]["successful"]["median"])


def aiperf(run: Run) -> float:
    """Return the median time between tokens in ms, as aiperf reports it."""
    _execute(
        run, AIPERF, "profile", "--url", run.url, "--model", run.model,
        "--tokenizer", str(TOKENIZER), "--endpoint-type", "completions", "--streaming",
        "--use-server-token-count",
        "--input-file", str(_json_lines(run, [{"text": prompt} for prompt in run.prompts])),
        "--custom-dataset-type", "single_turn", "--concurrency", str(run.concurrency),
        "--request-count", str(len(run.prompts)),
        "--extra-inputs", f"max_tokens:{run.max_tokens}", "ignore_eos:true",
        "--artifact-dir", str(run.directory / "aiperf"), "--ui-type", "none",
    )  # fmt: skip
    return float(_read(run.directory / "aiperf/profile_export_aiperf.json")["inter_token_latency"]["p50"])


def loadtest(run: Run) -> float:
    """Return the median time between tokens in ms, as this load generator reports it."""
    report = run.directory / "loadtest.json"
    _execute(
        run, Path(sys.executable), "-m", "loadtest", "--server", run.url, "--stream", "--ignore-eos",
        "--concurrency", str(run.concurrency), "--requests", str(len(run.prompts)), "--warmup", "0",
        "--max-tokens", str(run.max_tokens), "--prompts", str(_json_lines(run, [{"prompt": p} for p in run.prompts])),
        "--quiet", "--output", str(report),
    )  # fmt: skip
    return float(_read(report)["runs"][0]["tpot_ms"]["p50"])


GENERATORS: dict[str, Callable[[Run], float]] = {"guidellm": guidellm, "aiperf": aiperf, REFERENCE: loadtest}


def measure(load: Load, prompts: tuple[str, ...], rounds: int) -> list[dict[str, float]]:
    """Return for each round, by program, the median time between tokens in ms."""
    with DIRECT.open(f"{load.server.rstrip('/')}/v1/models", timeout=10) as response:
        model = json.load(response)["data"][0]["id"]
    found: list[dict[str, float]] = [{} for _ in range(rounds)]
    for number, of_round in enumerate(found, 1):
        for name, generator in GENERATORS.items():
            with tempfile.TemporaryDirectory(prefix="la-") as directory:
                run = Run(
                    load.server, model, load.concurrency or 1, load.max_tokens.values[0], prompts, Path(directory)
                )
                of_round[name] = generator(run)
            typer.echo(f"round {number}, {name}: {of_round[name]:.3f} ms")
    return found


def compare(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the median of each program's rounds in ms, and its ratio to that of this load generator."""
    medians = {name: median(found[name] for found in rounds) for name in rounds[0]}
    return {
        "median_ms": {name: round(value, 4) for name, value in medians.items()},
        "ratios": {name: round(value / medians[REFERENCE], 3) for name, value in medians.items()},
    }


def _execute(run: Run, program: Path, *arguments: str) -> None:
    """Run a program. Raise RuntimeError with the end of its output if it fails."""
    environment = {**os.environ, **without_proxy_for_loopback(os.environ)}
    directory = None  # this one, which has the package `loadtest`
    if program != Path(sys.executable):
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        environment["HOME"] = str(directory := run.directory)
    log = run.directory / "log"
    with log.open("w") as out:
        done = subprocess.run(
            [program, *arguments], cwd=directory, env=environment, timeout=LIMIT_S, check=False,
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} ended with {done.returncode}:\n{log.read_text(errors='replace')[-3000:]}")


def _json_lines(run: Run, rows: list[dict[str, Any]]) -> Path:
    path = run.directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    server: Annotated[str, typer.Option(metavar="URL", help="http://HOST:PORT of a service.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="For the result.")],
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 4,
    requests: Annotated[int, typer.Option(help="Requests of each run.")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    prompt_words: Annotated[int, typer.Option(help="Words of each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Runs of each program.")] = 3,
) -> None:
    """Measure a running service with guidellm, aiperf and this load generator, one after the other."""
    with command_errors():
        check_file(out)
        require_at_least(1, concurrency=concurrency, requests=requests, rounds=rounds)
        require_at_least(1, max_tokens=max_tokens, prompt_words=prompt_words)
        if missing := [str(path) for path in (GUIDELLM, AIPERF, TOKENIZER) if not path.exists()]:
            raise ValueError(f"{', '.join(missing)} is missing: run make clients first")
        settings = {"concurrency": concurrency, "requests": requests, "max_tokens": max_tokens}
        load = Load(server, Mix((max_tokens,), (1.0,)), concurrency, prompt_words=Mix((prompt_words,), (1.0,)))
        workload = Workload(load)
        found = measure(load, tuple(workload[turn].prompt for turn in range(requests)), rounds)
        result = {**settings, "prompt_words": prompt_words, "rounds_ms": found, **compare(found)}
        command = f"python -m loadtest.bench.agreement {shlex.join(sys.argv[1:])}"
        result_file.write_json(out, {"command": command, **describe(), **result})
        rows = [[name, f"{result['median_ms'][name]:.3f}", f"{ratio:.3f}"] for name, ratio in result["ratios"].items()]
        typer.echo(table(["program", "median, ms per token", f"/ {REFERENCE}"], rows))


if __name__ == "__main__":
    typer.run(main)

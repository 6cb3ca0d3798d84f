"""Compare what guidellm, aiperf and this load generator measure of the same load: the median time between tokens.

    python -m loadtest.bench.agreement --out docs/results/agreement.json

Each sends the same prompts, streamed over HTTP, and asks for the same number of tokens with `ignore_eos`. They run one
after the other, several times. Without `--server`, a service with one replica runs meanwhile. Its engine takes 20 ms
for each step, so that a program that needs much CPU time, or another one on the machine, does not slow it. `make
clients` installs the other two.

Each divides the time from a request's first message with text to its last one by a number of tokens. This load
generator divides by the tokens after the first message. guidellm 0.8.1 and aiperf 0.13.0 divide by all tokens but one,
so they are right only if the first message has one token. aiperf gives the messages of one read from the socket the
same time. If it reads late, several messages are its first one, and its time is too low. Its raw records have the
number of tokens with each message, so the right time is calculated from them, too.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Optional

import typer
import yaml

from loadtest.bench import paced_engine, services
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
CONFIG = Path("configs/serve.yaml")
USAGE = {"include_usage": True, "continuous_usage_stats": True}  # each message says how many tokens the answer has
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


def guidellm(run: Run) -> dict[str, float]:
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
    return {"guidellm": float(metrics["inter_token_latency_ms"]["successful"]["median"])}


def aiperf(run: Run) -> dict[str, float]:
    """Return the median time between tokens in ms, as aiperf reports it, and from its raw records."""
    fields = {"max_tokens": run.max_tokens, "ignore_eos": True, "stream_options": USAGE}
    reports = run.directory / "aiperf"
    _execute(
        run, AIPERF, "profile", "--url", run.url, "--model", run.model,
        "--tokenizer", str(TOKENIZER), "--endpoint-type", "completions", "--streaming",
        "--use-server-token-count",
        "--input-file", str(_json_lines(run, [{"text": prompt} for prompt in run.prompts])),
        "--custom-dataset-type", "single_turn", "--concurrency", str(run.concurrency),
        "--request-count", str(len(run.prompts)), "--extra-inputs", json.dumps(fields),
        "--export-level", "raw", "--artifact-dir", str(reports), "--ui-type", "none",
        "--no-gpu-telemetry", "--no-server-metrics",
    )  # fmt: skip
    reported = _read(reports / "profile_export_aiperf.json")["inter_token_latency"]["p50"]
    lines = (reports / "profile_export_raw.jsonl").read_text(encoding="utf-8").splitlines()
    return {"aiperf": float(reported), "aiperf, from its records": from_records(map(json.loads, lines))}


def from_records(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the median time between tokens in ms: the time after the first read, divided by the tokens after it.

    records: aiperf's raw ones, with the number of tokens in each message. A read can have several messages.
    Raises ValueError if every answer came in one read.
    """
    times_ms = []
    for record in records:
        reads: dict[int, int] = {}  # time in ns -> tokens of the answer by then
        for response in record["responses"]:
            for packet in response["packets"]:
                message = {} if packet["value"] == "[DONE]" else json.loads(packet["value"])
                if any(choice["text"] for choice in message.get("choices", ())):
                    reads[response["perf_ns"]] = message["usage"]["completion_tokens"]
        if len(reads) > 1:
            first, last = min(reads), max(reads)
            times_ms.append((last - first) / (reads[last] - reads[first]) / 1e6)
    if not times_ms:
        raise ValueError("aiperf read every answer at once: set a higher --max-tokens")
    return median(times_ms)


def loadtest(run: Run) -> dict[str, float]:
    """Return the median time between tokens in ms, as this load generator reports it."""
    report = run.directory / "loadtest.json"
    _execute(
        run, Path(sys.executable), "-m", "loadtest", "--server", run.url, "--stream", "--ignore-eos",
        "--concurrency", str(run.concurrency), "--requests", str(len(run.prompts)), "--warmup", "0",
        "--max-tokens", str(run.max_tokens), "--prompts", str(_json_lines(run, [{"prompt": p} for p in run.prompts])),
        "--quiet", "--output", str(report),
    )  # fmt: skip
    return {REFERENCE: float(_read(report)["runs"][0]["tpot_ms"]["p50"])}


GENERATORS: tuple[Callable[[Run], dict[str, float]], ...] = (guidellm, aiperf, loadtest)


@contextmanager
def own_service() -> Iterator[str]:
    """Run a service whose engine has constant steps. Yield its URL."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    variables = values["controller_options"]["runtime_env"]["env_vars"]
    variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = f"{paced_engine.__name__}.begin"
    with tempfile.TemporaryDirectory(prefix="la-") as directory:
        config = Path(directory, CONFIG.name)
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        with services.ray_service(config, replicas=1, tree=Path.cwd()) as service:
            yield f"http://localhost:{service.http_port}"


def measure(load: Load, prompts: tuple[str, ...], rounds: int) -> list[dict[str, float]]:
    """Return for each round, by figure, the median time between tokens in ms. Rounds begin with different programs."""
    with DIRECT.open(f"{load.server.rstrip('/')}/v1/models", timeout=10) as response:
        model = json.load(response)["data"][0]["id"]
    found: list[dict[str, float]] = [{} for _ in range(rounds)]
    for number, of_round in enumerate(found):
        first = number % len(GENERATORS)
        for generator in GENERATORS[first:] + GENERATORS[:first]:
            with tempfile.TemporaryDirectory(prefix="la-") as directory:
                run = Run(
                    load.server, model, load.concurrency or 1, load.max_tokens.values[0], prompts, Path(directory)
                )
                figures = generator(run)
            of_round |= figures
            for name, value in figures.items():
                typer.echo(f"round {number + 1}, {name}: {value:.3f} ms")
    return found


def compare(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return by figure the median of the rounds in ms, and the median of the ratios to this load generator's figure."""
    names = sorted(rounds[0])
    return {
        "median_ms": {name: round(median(found[name] for found in rounds), 4) for name in names},
        "ratios": {name: round(median(found[name] / found[REFERENCE] for found in rounds), 3) for name in names},
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


def _version(program: Path) -> str:
    """Return the version of the package that a program is from."""
    code = f"import importlib.metadata; print(importlib.metadata.version({program.name!r}))"
    python = program.with_name("python")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _json_lines(run: Run, rows: list[dict[str, Any]]) -> Path:
    path = run.directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="For the result.")],
    server: Annotated[
        Optional[str], typer.Option(metavar="URL", help="http://HOST:PORT of a running service; default: a new one.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once. More than the slots keep all slots busy.")] = 32,
    requests: Annotated[int, typer.Option(help="Requests of each run.")] = 80,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 192,
    prompt_words: Annotated[int, typer.Option(help="Words of each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Runs of each program.")] = 3,
) -> None:
    """Measure a service with guidellm, aiperf and this load generator, one after the other."""
    with command_errors():
        check_file(out)
        require_at_least(1, concurrency=concurrency, requests=requests, rounds=rounds)
        require_at_least(1, max_tokens=max_tokens, prompt_words=prompt_words)
        if missing := [str(path) for path in (GUIDELLM, AIPERF, TOKENIZER) if not path.exists()]:
            raise ValueError(f"{', '.join(missing)} is missing: run make clients first")
        step_ms = None if server else 1000 * paced_engine.STEP_S
        settings = {"step_ms": step_ms, "concurrency": concurrency, "requests": requests, "max_tokens": max_tokens}
        with nullcontext(server) if server else own_service() as url:
            load = Load(url, Mix((max_tokens,), (1.0,)), concurrency, prompt_words=Mix((prompt_words,), (1.0,)))
            workload = Workload(load)
            found = measure(load, tuple(workload[turn].prompt for turn in range(requests)), rounds)
        versions = {program.name: _version(program) for program in (GUIDELLM, AIPERF)}
        result = {"versions": versions, **settings, "prompt_words": prompt_words, "rounds_ms": found, **compare(found)}
        command = shlex.join(["python", "-m", "loadtest.bench.agreement", *sys.argv[1:]])
        result_file.write_json(out, {"command": command, **describe(), **result})
        typer.echo(agreement_table(result))


def agreement_table(result: Mapping[str, Any]) -> str:
    """Return the medians and the ratios as a Markdown table."""
    rows = [[name, f"{ms:.3f}", f"{result['ratios'][name]:.3f}"] for name, ms in result["median_ms"].items()]
    return table(["measured by", "ms per token", f"/ {REFERENCE}"], rows)


if __name__ == "__main__":
    typer.run(main)

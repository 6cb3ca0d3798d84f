"""The options that the command lines of the load test and of its benchmarks share, and their checks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from tinylm.terminal.output import one_line_errors

PACKAGES = {"hdrhistogram": "hdrh", **{name: name for name in ("psutil", "matplotlib", "scipy", "jinja2", "aiohttp")}}
INSTALL = "pip install -e '.[bench]'"

Server = Annotated[
    str,
    typer.Option(
        "--server",
        "-s",
        metavar="ADDRESS",
        help="HOST:PORT of a service, http://HOST:PORT of one with OpenAI's completions, "
        "engine:MODEL_DIRECTORY for the engine without a service.",
    ),
]
Concurrency = Annotated[
    Optional[str], typer.Option(metavar="N,N,...", help="Closed loop: number of clients. Default 4.")
]
Rate = Annotated[Optional[str], typer.Option(metavar="R,R,...", help="Open loop: requests per second.")]
Arrivals = Annotated[str, typer.Option(help="Open loop: poisson or constant.")]
Stream = Annotated[bool, typer.Option("--stream", help="Call GenerateStream instead of Generate.")]
Duration = Annotated[float, typer.Option(help="Measured seconds of each run.")]
Requests = Annotated[Optional[int], typer.Option(help="End each run after this number of requests.")]
Warmup = Annotated[float, typer.Option(help="Seconds before the measured time of each run.")]
MaxTokens = Annotated[
    str,
    typer.Option("--max-tokens", "-n", metavar="N[:SHARE],...", help="Tokens of each answer, as in 16:0.5,64:0.5."),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="The model does not end answers itself, so that each has --max-tokens.")
]
Prompts = Annotated[
    Optional[Path], typer.Option(metavar="FILE", help='One a line: text, or {"prompt": ...} in a .jsonl.')
]
PromptWords = Annotated[
    Optional[str],
    typer.Option(metavar="N[:SHARE],...", help="Lengths of random built-in prompts. Default: 4 short prompts."),
]
Repeat = Annotated[int, typer.Option(help="Repeat all runs this number of times, for `compare`.")]
Goodput = Annotated[
    Optional[str],
    typer.Option(metavar="LIMITS", help="Count requests within limits in ms: ttft<50,tpot<5,e2e<500."),
]
Processes = Annotated[
    Optional[int], typer.Option(help="Processes of the load generator. Default: 1, and more if one is too busy.")
]
Connections = Annotated[
    Optional[int], typer.Option(help="Connections to the service. Default: one per client, 16 in an open loop.")
]
MaxInFlight = Annotated[
    int, typer.Option(help="Open loop: requests beyond this number wait, and their waiting counts.")
]
Timeout = Annotated[float, typer.Option(help="Seconds after which a call is DEADLINE_EXCEEDED.")]
Seed = Annotated[int, typer.Option(help="Seed of arrivals, mixes and answers.")]
Priority = Annotated[
    bool, typer.Option(help="Schedule the load generator before other processes, where that is permitted.")
]
ApiKey = Annotated[
    Optional[str],
    typer.Option(
        envvar="TINYLM_API_KEY", show_envvar=True, help="Sent as `authorization: Bearer KEY`; no result contains it."
    ),
]
Certificates = Annotated[Optional[Path], typer.Option(metavar="FILE", help="PEM certificates to trust. Uses TLS.")]
Label = Annotated[Optional[str], typer.Option(help="Name of this result in reports.")]
Replicas = Annotated[
    Optional[int], typer.Option(help="Replicas of the service, for reports. Default: those that answer.")
]
Output = Annotated[
    Optional[Path],
    typer.Option(
        "--output", "-o", metavar="FILE.json", help="Write the result as JSON, and the runs as CSV beside it."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no live view and no table.")]


@contextmanager
def command_errors() -> Iterator[None]:
    """Run a command: see `tinylm.terminal.output.one_line_errors`. Raises ValueError if packages are missing."""
    with one_line_errors(ValueError, RuntimeError):
        missing = [package for package, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"the load test needs {', '.join(missing)}: {INSTALL}")
        yield


def integers(option: str, text: str) -> list[int]:
    """Return the whole numbers of `1,2,4`. Raises ValueError that names the option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: it must be whole numbers separated by commas") from None


def decimals(option: str, text: str) -> list[float]:
    """Return the numbers of `1.1,2`. Raises ValueError that names the option."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} is {text!r}: it must be numbers separated by commas") from None


def names_that_begin(option: str, prefixes: str | None, names: Iterable[str]) -> list[str]:
    """Return the names that begin with one of the prefixes of `a,b`, or all names for None.

    Raises ValueError that names the option if no name begins with one of them.
    """
    names, chosen = list(names), tuple(prefixes.split(",")) if prefixes else ("",)
    for prefix in chosen:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"{option} names {prefix!r}: it must be the beginning of one of {', '.join(names)}")
    return [name for name in names if name.startswith(chosen)]


def require_at_least(least: float, **options: float | None) -> None:
    """Raise ValueError if one of the options is given and below the limit, infinite or not a number."""
    for name, value in options.items():
        if value is not None and not least <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least {least} and finite")

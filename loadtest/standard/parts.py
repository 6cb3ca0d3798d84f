"""The standard set: which services are measured under which loads, part by part, so that it can be interrupted.

A part's result is a file; one that is there with the same loads is kept, so that the same command goes on where it
was stopped.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from loadtest import result
from loadtest.load import Load, Mix
from loadtest.plots import against_load
from loadtest.report import DPI, check_picture
from loadtest.server import facts
from loadtest.standard import services
from loadtest.sweep import Sweep
from loadtest.sweep import carry_out as run_sweep
from tinylm.files import as_png, write_file
from tinylm.terminal.output import PlainConsole

TOKENS = Mix((64,), (1.0,))
PICTURE = "load-unary.png"
REPLICAS = 4
START_S = 30  # about what starting and stopping a service takes
FEW = 2  # of the numbers of clients, the highest: for parts of which the trend is wanted
HAPROXY, PYTHON_PROXY = Path("configs/serve.yaml"), Path("configs/serve-python-proxy.yaml")
CORES = os.cpu_count() or 1
console = PlainConsole(stderr=True)


@dataclass(frozen=True)
class Settings:
    """How long and how hard, for every part alike."""

    out: Path
    duration_s: float
    warmup_s: float
    repeats: int
    concurrency: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeat is {self.repeats}: it must be at least 1")


@dataclass(frozen=True)
class Part:
    """One service to start, and how to measure it."""

    name: str
    label: str
    start: Callable[[], AbstractContextManager[str]]  # gives the address of a service that runs
    replicas: int | None = None
    series: str = ""  # what it is but for the number of replicas
    few: bool = False  # only the highest numbers of clients
    processes: int | None = None  # of the load generator
    packages: tuple[str, ...] = ()  # modules that it needs beyond ours

    def sweep(self, settings: Settings, address: str, stream: bool) -> Sweep:
        clients = sorted(settings.concurrency)[-FEW:] if self.few else settings.concurrency
        loads = [
            Load(address, TOKENS, n, stream=stream, duration_s=settings.duration_s, warmup_s=settings.warmup_s)
            for n in clients
        ]
        return Sweep(tuple(loads), settings.repeats, self.processes)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def _serve(config: Path, replicas: int) -> Callable[[], AbstractContextManager[str]]:
    return lambda: services.ray_serve(config, replicas)


PARTS = (
    Part(
        "haproxy", f"Ray Serve, HAProxy mode, {REPLICAS} replicas", _serve(HAPROXY, REPLICAS), REPLICAS, "HAProxy mode"
    ),
    Part(
        "python-proxy",
        f"Ray Serve, Python proxy, {REPLICAS} replicas",
        _serve(PYTHON_PROXY, REPLICAS),
        REPLICAS,
        "Python proxy",
    ),
    *(
        Part(
            f"replicas-{n}",
            f"Ray Serve, HAProxy mode, {n} replica{'s' * (n > 1)}",
            _serve(HAPROXY, n),
            n,
            "HAProxy mode",
            few=True,
        )
        for n in range(1, REPLICAS)
    ),
    Part("engine", f"the engine alone, {CORES} processes", services.engine, processes=CORES),
    Part(f"engine-{REPLICAS}", f"the engine alone, {REPLICAS} processes", services.engine, processes=REPLICAS),
    Part("bare-1", "grpc.aio, 1 process", lambda: services.bare(1)),
    Part(f"bare-{REPLICAS}", f"grpc.aio, {REPLICAS} processes", lambda: services.bare(REPLICAS)),
    Part(
        "llama",
        "llama-cpp-python's server",
        lambda: services.llama(CORES),
        packages=("llama_cpp", "gguf", "starlette_context", "sse_starlette", "pydantic_settings"),
    ),
)


def choose(only: str | None) -> list[Part]:
    """The parts whose names begin with one of those given. Raises ValueError for a name that none begins with."""
    wanted = only.split(",") if only else [""]
    for name in wanted:
        if not any(part.name.startswith(name) for part in PARTS):
            raise ValueError(f"--only names {name!r}: the parts are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if part.name.startswith(tuple(wanted))]


def show_plan(parts: list[Part], settings: Settings, again: bool) -> None:
    """What will be done, and about how long it takes."""
    table = Table(box=box.SIMPLE_HEAD, title=f"the standard set, into {settings.out}", title_justify="left")
    for column in ("part", "what", "still to do", "about"):
        table.add_column(column)
    total = 0.0
    for part in parts:
        modes = to_do(part, settings, again)
        seconds = 0.0 if part.missing else _seconds(part, modes, settings)
        total += seconds
        state = f"no package {part.missing[0]}" if part.missing else ", ".join(map(_mode, modes)) or "nothing"
        table.add_row(part.name, part.label, state, f"{seconds / 60:.0f} min" if modes else "")
    console.print(table)
    console.print(f"about {total / 60:.0f} minutes in all; interrupt it whenever you like, the same command goes on")


def carry_out(parts: list[Part], settings: Settings, again: bool, quiet: bool) -> None:
    """Measure what is still to do, then draw everything. Raises RuntimeError at the end when a part has failed."""
    planned = [(part, to_do(part, settings, again)) for part in parts if not part.missing]
    planned = [(part, modes) for part, modes in planned if modes]
    for part, modes in planned:
        for stream in modes:
            result.check_own_result(_path(part, settings, stream))
    check_picture(settings.out / PICTURE)
    failed: dict[str, str] = {}
    busy = os.getloadavg()[0]
    if planned and busy > 0.3 * CORES:
        console.print(f"note: the machine is busy (load {busy:.1f}): wait until it is quiet", style="yellow")
    for number, (part, modes) in enumerate(planned):
        left = sum(_seconds(other, theirs, settings) for other, theirs in planned[number:])
        console.print(f"{part.name} ({number + 1} of {len(planned)}), about {left / 60:.0f} min left")
        try:
            with part.start() as address:
                for stream in modes:
                    _measure(part, settings, address, stream, quiet)
        except (RuntimeError, ValueError, OSError) as error:
            console.print(f"{part.name} failed: {error}", style="red")
            failed[part.name] = str(error)
    files = [_path(part, settings, stream) for part in PARTS for stream in (False, True)]
    if found := [result.read(path) for path in files if path.exists()]:
        draw(found, settings.out / PICTURE)
    if failed:
        raise RuntimeError(f"{len(failed)} parts failed: {', '.join(failed)}; the same command tries them again")


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the picture of docs/speed.md: throughput and p99 of all parts against the number of clients."""
    if figure := against_load(results, stream=False):
        check_picture(path)
        write_file(path, as_png(figure, DPI))
        console.print(f"wrote {path}")


def _measure(part: Part, settings: Settings, address: str, stream: bool, quiet: bool) -> None:
    began = time.monotonic()
    sweep = part.sweep(settings, address, stream)
    about = facts(sweep.loads[0])
    runs = run_sweep(sweep, quiet)
    if not all(run["statuses"].get("OK") for run in runs):
        raise RuntimeError(f"a run without any answer: {[run['statuses'] for run in runs]}")
    found = result.assemble(runs, part.label, part.replicas, about, part.series or part.label)
    result.write(_path(part, settings, stream), found)
    console.print(f"  {_mode(stream)}: {len(runs)} runs in {(time.monotonic() - began) / 60:.1f} min")


def to_do(part: Part, settings: Settings, again: bool) -> list[bool]:
    """Which of unary (False) and stream (True) have no result with these loads yet."""
    return [stream for stream in (False, True) if again or not _is_done(part, settings, stream)]


def _is_done(part: Part, settings: Settings, stream: bool) -> bool:
    try:
        found = result.read(_path(part, settings, stream))
    except (OSError, ValueError):
        return False
    wanted = part.sweep(settings, "", stream)
    planned = [(load.concurrency, load.duration_s, load.warmup_s) for load in wanted.loads] * wanted.repeats
    loads = [run["load"] for run in found["runs"]]
    return planned == [(load["concurrency"], load["duration_s"], load["warmup_s"]) for load in loads]


def _seconds(part: Part, modes: list[bool], settings: Settings) -> float:
    return START_S * bool(modes) + sum(part.sweep(settings, "", stream).seconds for stream in modes)


def _path(part: Part, settings: Settings, stream: bool) -> Path:
    return settings.out / f"{part.name}-{_mode(stream)}.json"


def _mode(stream: bool) -> str:
    return "stream" if stream else "unary"

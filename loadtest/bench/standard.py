"""The standard set: the services that docs/speed.md shows, measured part by part.

    python -m loadtest.bench.standard --list

The result of a part is a file. A part whose file has the same loads already is not measured again, so the same command
resumes an interrupted set.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from loadtest.bench import services
from loadtest.load import Load, Mix
from loadtest.measured_server import facts
from loadtest.options import Duration, Quiet, Warmup, command_errors, integers, names_that_begin, require_at_least
from loadtest.results import plots, result_file
from loadtest.results.table import make_table
from loadtest.sweep import Sweep, run_sweep
from tinylm.system.files import as_png, write_file
from tinylm.terminal.output import PlainConsole

TOKENS = Mix((64,), (1.0,))
PICTURE = "load-unary.png"
REPLICAS = 4
START_S = 30  # about what starting and stopping a service takes
FEW = 2  # the highest numbers of clients, for parts of which only the trend matters
HAPROXY, PYTHON_PROXY = Path("configs/serve.yaml"), Path("configs/serve-python-proxy.yaml")
CORES = os.cpu_count() or 1
MODES = {False: "unary", True: "stream"}
console = PlainConsole(stderr=True)


@dataclass(frozen=True)
class Settings:
    """The settings of all parts."""

    out: Path
    duration_s: float
    warmup_s: float
    repeats: int
    concurrency: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One service to start, and how to measure it."""

    name: str
    label: str
    start: Callable[[], AbstractContextManager[str]]  # yields the address of a running service
    replicas: int | None = None
    few: bool = False  # only the highest numbers of clients
    processes: int | None = None  # of the load generator
    packages: tuple[str, ...] = ()  # modules that it needs

    def sweep(self, settings: Settings, address: str, stream: bool) -> Sweep:
        clients = sorted(settings.concurrency)[-FEW:] if self.few else settings.concurrency
        loads = [
            Load(address, TOKENS, n, stream=stream, duration_s=settings.duration_s, warmup_s=settings.warmup_s)
            for n in clients
        ]
        return Sweep(tuple(loads), settings.repeats, self.processes)

    def path(self, settings: Settings, stream: bool) -> Path:
        return settings.out / f"{self.name}-{MODES[stream]}.json"

    def missing_package(self) -> str | None:
        return next((name for name in self.packages if importlib.util.find_spec(name) is None), None)


def _ray_serve(name: str, config: Path, mode: str, replicas: int, few: bool = False) -> Part:
    label = f"Ray Serve, {mode}, {replicas} replica{'s' * (replicas > 1)}"
    return Part(name, label, partial(services.ray_serve, config, replicas), replicas, few)


LLAMA_PACKAGES = ("llama_cpp", "gguf", "starlette_context", "sse_starlette", "pydantic_settings")
PARTS = (
    _ray_serve("haproxy", HAPROXY, "HAProxy mode", REPLICAS),
    _ray_serve("python-proxy", PYTHON_PROXY, "Python proxy", REPLICAS),
    *(_ray_serve(f"replicas-{n}", HAPROXY, "HAProxy mode", n, few=True) for n in range(1, REPLICAS)),
    Part("engine", f"the engine alone, {CORES} processes", services.engine, processes=CORES),
    Part(f"engine-{REPLICAS}", f"the engine alone, {REPLICAS} processes", services.engine, processes=REPLICAS),
    Part("bare-1", "grpc.aio, 1 process", partial(services.bare, 1)),
    Part(f"bare-{REPLICAS}", f"grpc.aio, {REPLICAS} processes", partial(services.bare, REPLICAS)),
    Part("llama", "llama-cpp-python's server", partial(services.llama, CORES), packages=LLAMA_PACKAGES),
)


def show_plan(parts: Sequence[Part], settings: Settings, again: bool) -> None:
    """Print which results are missing, and about how long it takes to measure them."""
    table = make_table(f"the standard set, into {settings.out}", "part", "what", "still to do", justify="left")
    total_s = 0.0
    for part in parts:
        modes = to_do(part, settings, again)
        if package := part.missing_package():
            state = f"no package {package}"
        else:
            state = ", ".join(MODES[stream] for stream in modes) or "nothing"
            total_s += START_S * bool(modes) + sum(part.sweep(settings, "", stream).seconds for stream in modes)
        table.add_row(part.name, part.label, state)
    console.print(table)
    console.print(f"about {total_s / 60:.0f} minutes in total; you can interrupt it: the same command resumes")


def measure(parts: Sequence[Part], settings: Settings, again: bool, quiet: bool) -> None:
    """Measure the missing results, then draw the picture. Raises RuntimeError at the end if a part failed."""
    planned = {part: to_do(part, settings, again) for part in parts if not part.missing_package()}
    for part, modes in planned.items():
        for stream in modes:
            result_file.check_own_result(part.path(settings, stream))
    plots.check_picture(settings.out / PICTURE)
    busy = os.getloadavg()[0]
    if any(planned.values()) and busy > 0.3 * CORES:
        console.print(f"note: the machine is busy (load {busy:.1f}): wait until it is idle", style="yellow")
    failed = []
    for part, modes in planned.items():
        if modes:
            try:
                _measure_part(part, settings, modes, quiet)
            except (RuntimeError, ValueError, OSError) as error:
                console.print(f"{part.name} failed: {error}", style="red")
                failed.append(part.name)
    files = [part.path(settings, stream) for part in PARTS for stream in MODES]
    draw([result_file.read(path) for path in files if path.exists()], settings.out / PICTURE)
    if failed:
        raise RuntimeError(f"{len(failed)} parts failed: {', '.join(failed)}; the same command tries them again")


def _measure_part(part: Part, settings: Settings, modes: Sequence[bool], quiet: bool) -> None:
    """Start a service, measure it in these modes, and write a result for each."""
    console.print(part.name)
    with part.start() as address:
        for stream in modes:
            sweep = part.sweep(settings, address, stream)
            service = facts(sweep.loads[0])
            runs = run_sweep(sweep, quiet)
            if not all(run["statuses"].get("OK") for run in runs):
                raise RuntimeError(f"a run had no answer: {[run['statuses'] for run in runs]}")
            found = result_file.assemble(runs, part.label, service, part.replicas)
            result_file.write(part.path(settings, stream), found)
            console.print(f"  {MODES[stream]}: {len(runs)} runs")


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the picture of docs/speed.md: throughput and p99 of all parts against the number of clients."""
    if figure := plots.against_load(results, stream=False):
        plots.check_picture(path)
        write_file(path, as_png(figure, plots.DPI))
        console.print(f"wrote {path}")


def to_do(part: Part, settings: Settings, again: bool) -> list[bool]:
    """Return which of unary (False) and stream (True) have no result with these loads."""
    return [stream for stream in MODES if again or not _is_done(part, settings, stream)]


def _is_done(part: Part, settings: Settings, stream: bool) -> bool:
    try:
        found = result_file.read(part.path(settings, stream))
    except (OSError, ValueError):
        return False
    wanted = part.sweep(settings, "", stream)
    planned = [(load.concurrency, load.duration_s, load.warmup_s) for load in wanted.loads] * wanted.repeats
    loads = [run["load"] for run in found["runs"]]
    return planned == [(load["concurrency"], load["duration_s"], load["warmup_s"]) for load in loads]


def main(
    out: Annotated[Path, typer.Option(metavar="DIR", help="For the results. Existing results are kept.")] = Path(
        "docs/results/standard"
    ),
    only: Annotated[Optional[str], typer.Option(metavar="PART,...", help="Beginnings of names of parts.")] = None,
    duration: Duration = 15,
    warmup: Warmup = 3,
    repeat: Annotated[int, typer.Option(help="Rounds of each part.")] = 3,
    concurrency: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of clients.")] = "1,2,4,8,16,32",
    again: Annotated[bool, typer.Option("--again", help="Measure existing results again.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Print which results are missing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure the standard set. It starts each service itself: both proxies, replicas, the bare engine, llama.cpp."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the services that it started, as Ctrl-C does
    with command_errors():
        require_at_least(1, repeat=repeat)
        settings = Settings(out, duration, warmup, repeat, tuple(integers("--concurrency", concurrency)))
        names = names_that_begin("--only", only, [part.name for part in PARTS])
        chosen = [part for part in PARTS if part.name in names]
        show_plan(chosen, settings, again)
        if not list_only:
            measure(chosen, settings, again, quiet)


if __name__ == "__main__":  # the processes that make calls import this module too
    typer.run(main)

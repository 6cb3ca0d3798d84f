"""Fill the blocks of docs/speed.md, docs/engine.md, docs/operate.md, docs/clients.md and docs/use.md from docs/results.

python -m loadtest.bench.pages
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from loadtest.bench import speed_page
from loadtest.bench.agreement import agreement_table
from loadtest.bench.markdown import fill, table
from tinylm.system.files import write_file

DOCS = Path("docs")
PAGE_WIDTH = 135  # characters of a line of prose
CHAOS_COLUMNS = {
    "requests": "requests",
    "answered": "answered",
    "refused": "refused",
    "cut": "cut",
    "lost": "lost",
    "slowest_request_s": "slowest, s",
    "healed_s": "healed, s",
    "memory_growth_mib": "memory, MiB",
}
GROWTHS = ("growth_kib_per_minute", "late_growth_kib_per_minute", "role_growth_kib_per_minute")
MEMORY_COLUMNS = (
    "processes",
    "number",
    "MiB after 5 minutes",
    "MiB at the end",
    "growth, KiB per minute",
    "in the second half",
    "of the mean",
    "open files",
    "threads",
)
# The names on the page of peers that have other names in results.
PEER_LABELS = {
    "tinylm": "**TinyLM** (numba, int8)",
    "tinylm-float32": "TinyLM (numba, float32 arithmetic)",
    "tinylm-numpy": "TinyLM (numpy)",
}


def operate_blocks(results: Path) -> dict[str, str]:
    """Return the blocks of docs/operate.md: faults, misbehaving clients, and memory under mixed load."""
    return {
        "faults": _faults(results),
        "misbehaving": _misbehaving(results),
        "mixed-hour": _mixed_hour(_read(results / "mixed-hour.json")),
    }


def _faults(results: Path) -> str:
    """Return where the faults were tried, and the account of each."""
    report = _read(results / "chaos.json")
    machine = report["machine"]
    where = f"{report['date'][:10]}, {machine['processor']}, {machine['cores']} cores, Ray {report['versions']['ray']}."
    rows = [
        [name, *(_chaos_cell(key, figures.get(key)) for key in CHAOS_COLUMNS)]
        for name, figures in report["faults"].items()
    ]
    return f"{where}\n\n{table(['fault', *CHAOS_COLUMNS.values()], rows)}"


def _misbehaving(results: Path) -> str:
    head = ["beside", "errors", "requests/s", "p99", "slots still held", "replica, MiB", "HAProxy, MiB"]
    rows = []
    for name, found in _read(results / "misbehaving.json")["misbehaving"].items():
        grown = found["memory_growth_mib"]
        rows.append(
            [
                name,
                f"{found['errors']}",
                f"{found['requests_ratio']:.2f}",
                f"{found['p99_ratio']:.2f}",
                f"{found['requests_left']}",
                *(f"{grown[role]:+.1f}" for role in ("replicas", "haproxy")),
            ]
        )
    return table(head, rows)


def _mixed_hour(result: dict[str, Any]) -> str:
    """Return the calls by their outcome, and the memory of each role of processes."""
    calls, machine = result["calls"], result["machine"]
    where = f"{result['date'][:10]}, {machine['processor']}, {machine['cores']} cores, {result['minutes']} minutes."
    counts = table([*calls], [[f"{n:,}" for n in calls.values()]])
    rows = [
        [
            role,
            str(found["processes"]),
            f"{found['settled']['mib']:.1f}",
            f"{found['end']['mib']:.1f}",
            *(_growth(found[name]) for name in GROWTHS),
            f"{found['settled']['open_files']:.0f}, {found['end']['open_files']:.0f}",
            f"{found['settled']['threads']:.0f}, {found['end']['threads']:.0f}",
        ]
        for role, found in result["memory"].items()
        if found["end"]["minute"] == result["minutes"]
    ]
    return f"{where}\n\n{counts}\n\n{table(MEMORY_COLUMNS, rows)}"


def _growth(kib_per_minute: float | None) -> str:
    return "" if kib_per_minute is None else f"{kib_per_minute:+.1f}"


def _chaos_cell(key: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:+.1f}" if key == "memory_growth_mib" else f"{value:,}"


def clients_blocks(results: Path) -> dict[str, str]:
    """Return the blocks of docs/clients.md: the programs that were tried, and what load generators measured."""
    rows = [
        [row["program"], f"{row['package']} {row['version']}", row["date"][:10], "works" if row["passed"] else "fails"]
        for row in _read(results / "clients.json")["programs"]
    ]
    found = _read(results / "agreement.json")
    machine, rounds = found["machine"], len(found["rounds_ms"])
    load = (
        f"steps of {found['step_ms']:g} ms, {found['concurrency']} requests at once, answers of {found['max_tokens']} "
        f"tokens, {rounds} rounds"
    )
    where = f"{found['date'][:10]}, {machine['processor']}, {machine['cores']} cores: {load}."
    programs = table(["program", "package", "tried on", "result"], rows)
    return {"programs": programs, "agreement": f"{where}\n\n{agreement_table(found)}"}


def use_blocks(results: Path) -> dict[str, str]:
    """Return the block of docs/use.md: what explanations cost the requests beside them."""
    result = _read(results / "explain-cost.json")
    settings, ratios, loaded = result["settings"], result["median_of_ratios"], result["loaded"]
    idle_ms, loaded_ms = result["idle"]["ms"]["computed"], loaded["ms"]["computed"]
    text = (
        f"{settings['clients']} clients under load got {ratios['requests_per_s']:.0%} of their requests per second, "
        f"with {ratios['p99_ms']:.0%} of the p99, while {settings['explorers']} others asked for explanations without "
        f"a pause. These are medians of {len(result['pairs'])} pairs of {settings['seconds']:.0f} s. "
        f"{loaded['answered']:,} explanations were answered and {loaded['refused']:,} refused. One that a replica "
        f"computes took {idle_ms['p50']:,.0f} ms at p50 and {idle_ms['p95']:,.0f} ms at p95 without load, and "
        f"{loaded_ms['p50']:,.0f} ms and {loaded_ms['p95']:,.0f} ms under this load "
        "([`explain-cost.json`](results/explain-cost.json))."
    )
    return {"explain-cost": textwrap.fill(text, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)}


def engine_blocks(results: Path) -> dict[str, str]:
    """Return the blocks of docs/engine.md: parts of a step, `tinylm bench`, AMX, revisions, engines, and ARM."""
    bench = _read(results / "bench.json")
    decode = [
        [
            f"{row['batch']}",
            f"{row['step_ms']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['bytes_per_step'] / 1e6:.1f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['share_of_peak']:.0%}",
        ]
        for row in bench["decode"]
    ]
    head = ["batch", "ms per step", "tokens/s", "MB per step", "of the core's bandwidth", "of its arithmetic"]
    return {
        "parts": _parts(_read(results / "parts.json")["forms"]),
        "decode": table(head, decode),
        "tiles": _tiles(_read(results / "tiles.json")),
        "leaner-step": _revisions(_read(results / "leaner-step.json")["forms"]),
        "service": _service(_read(results / "service-revisions.json")),
        "parts-of-an-answer": _parts_of_an_answer(_read(results / "service-revisions.json")),
        "peers": _peers(_read(results / "peers.json")),
        "arm": _arm(_read(results / "arm-estimate.json")["processors"]),
    }


def _parts(forms: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """forms: form of the kernels -> batch size -> the microseconds of each part, and their limits."""
    head, rows = ["part, us"], dict[str, list[str]]()
    for form, batches in forms.items():
        for batch, of_batch in batches.items():
            head.append(f"`{form}`, batch {batch}")
            for part, time in of_batch["microseconds"].items():
                rows.setdefault(part, [part]).append(f"{time:,.0f}")
                if least := of_batch["least_microseconds"].get(part):
                    rows.setdefault(f"least for {part}", [f"*at least, for {part}*"]).append(f"*{least:,.0f}*")
    return table(head, list(rows.values()))


def _tiles(result: dict[str, Any]) -> str:
    rows = [
        [case, f"{row['vectors_ms']:.3f}", f"{row['tiles_ms']:.3f}", f"{row['ratio']:.2f}"]
        for case, row in result["cases"].items()
    ]
    return table(["step", "vectors, ms", "tiles, ms", "ratio"], rows)


def _revisions(forms: dict[str, dict[str, Any]]) -> str:
    """forms: form of the kernels -> its comparison with an earlier revision."""
    head = ["form", "step", "earlier, ms", "now, ms", "ratio", "of the bandwidth", "of the peak"]
    rows = []
    for form, result in forms.items():
        for case, row in result["cases"].items():
            shares = [f"{row[key]:.0%}" if key in row else "" for key in ("of_bandwidth", "of_peak")]
            rows.append(
                [f"`{form}`", case, f"{row['old_ms']:.3f}", f"{row['new_ms']:.3f}", f"{row['ratio']:.2f}", *shares]
            )
    return table(head, rows)


def _service(result: dict[str, Any]) -> str:
    names = {"requests_per_s": "requests/s", "p50_ms": "latency p50, ms", "p99_ms": "latency p99, ms"}
    rows = [
        [label, f"{result[key]['old']:.1f}", f"{result[key]['new']:.1f}", f"{result[key]['ratio']:.2f}"]
        for key, label in names.items()
    ]
    return table(["", "earlier", "now", "ratio"], rows)


def _parts_of_an_answer(result: dict[str, Any]) -> str:
    names = {
        "engines": "the engine's thread",
        "replicas": "the rest of the replica: gRPC, tokens to text, Ray",
        "proxy": "HAProxy and its manager",
        "ray": "other processes of Ray",
        "load generator": "the load generator",
    }
    times = {label: result["cpu_ms_new"][part] for part, label in names.items()}
    total = sum(times.values())
    rows = [[label, f"{ms:.2f}", f"{ms / total:.0%}"] for label, ms in times.items()]
    return table(["part", "CPU ms of an answer", "share"], rows)


def _arm(processors: dict[str, dict[str, Any]]) -> str:
    rows = [[name, row["form"], *map(str, row["products_per_cycle"].values())] for name, row in processors.items()]
    counts = next(iter(processors.values()))["products_per_cycle"]
    return table(["processor", "form", *(f"{n} token{'s' * (n != '1')}" for n in counts)], rows)


def _peers(result: dict[str, Any]) -> str:
    cases = result["cases"]
    rows = [
        [PEER_LABELS.get(name, name), *(f"{peer['cases'][case]['tokens_per_cpu_s']:,.0f}" for case in cases)]
        for name, peer in result["peers"].items()
    ]
    ratios = result["ratios"]["tinylm / best of the others"]
    rows.append(["*TinyLM / best of the others*", *(f"{ratios[case]:.2f}" for case in cases)])
    head = [case.replace("decode ", "batch ").replace("prefill ", "prompt of ") for case in cases]
    return table(["tokens per CPU second", *head], rows)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Page -> function that returns its blocks from the directory of results.
PAGES: dict[str, Callable[[Path], dict[str, str]]] = {
    "speed.md": speed_page.blocks,
    "engine.md": engine_blocks,
    "operate.md": operate_blocks,
    "clients.md": clients_blocks,
    "use.md": use_blocks,
}


def main() -> None:
    """Fill the blocks of docs/speed.md, docs/engine.md, docs/operate.md, docs/clients.md and docs/use.md."""
    for name, blocks in PAGES.items():
        page = DOCS / name
        write_file(page, fill(page.read_text(encoding="utf-8"), blocks(DOCS / "results")))
        typer.echo(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)

"""Results as pictures and one HTML page that holds everything in itself. What is drawn is `plots`' business."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from loadtest import plots
from loadtest.table import load_name, ms, notes
from tinylm.files import PNG, as_png, check_file, check_own, is_own_png, write_file

DPI = 110
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>'
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } code { font-size: 12px; } .note { color: #8a5a00; } .facts { color: #666; font-size: 13px; }
"""
COLUMNS = ("load", "run", "req/s", "tokens/s", "latency p50", "p90", "p99", "p99.9", "max", "ttft p50", "p99")
MORE_COLUMNS = ("itl p50", "p99", "not OK", "replicas", "spread", "client cores", "server cores", "goodput")


def write(results: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Write report.html and one PNG for each picture; return the page's path.

    Raises FileExistsError, and writes nothing, when a file of these names is there that no report wrote.
    """
    page = directory / "report.html"
    check_own(page, lambda content: content.startswith(HEAD.encode()) and b"<h1>Load test</h1>" in content)
    check_file(page)
    shown = page.read_text(encoding="utf-8") if page.exists() else ""
    pictures: dict[str, bytes] = {}

    def add(name: str, figure: Figure) -> str:
        """Draw a picture for the file `name`.png; return its HTML."""
        while f"{name}.png" in pictures:  # two results of one label
            name += "-2"
        check_picture(directory / f"{name}.png", f'alt="{html.escape(name)}"' in shown)
        pictures[f"{name}.png"] = picture = as_png(figure, DPI)
        data = base64.b64encode(picture).decode()
        return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'

    body = ["<h1>Load test</h1>"]
    body += [add(name, figure) for name, figure in _overview(results)]
    for result in results:
        body.append(_section(result))
        slug = re.sub(r"[^\w.-]+", "-", result["label"]).strip("-")
        for quantity in plots.TITLES:
            if figure := plots.histograms(result, quantity):
                body.append(add(f"{slug}-{quantity}-histogram", figure))
            if figure := plots.percentiles(result, quantity):
                body.append(add(f"{slug}-{quantity}-percentiles", figure))
    title = html.escape(", ".join(result["label"] for result in results))
    head = f"{HEAD}{title}</title><style>{STYLE}</style>"
    for name, picture in pictures.items():
        write_file(directory / name, picture)
    write_file(page, head + "\n".join(body) + "</html>\n")
    return page


def check_picture(path: Path, is_shown: bool = False) -> None:
    """Raise OSError when something is at `path` that is not a picture of a result, or can't be written.

    is_shown: a report beside it shows a picture of this name. The pictures of older reports do not name their maker.
    """
    check_own(path, lambda content: is_own_png(content) or (is_shown and content.startswith(PNG)))
    check_file(path)


def _overview(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    for stream in (False, True):
        kind = "stream" if stream else "unary"
        if figure := plots.against_load(results, stream):
            yield f"load-{kind}", figure
        if figure := plots.against_replicas(results, stream):
            yield f"replicas-{kind}", figure


def _section(result: Mapping[str, Any]) -> str:
    """A result's heading, where and how it was measured, its runs, its notes."""
    machine, versions = result["machine"], result["versions"]
    facts = [result["date"], machine["processor"], f"{machine['cores']} cores", f"revision {result['revision']}"]
    facts += [f"{name} {version}" for name, version in versions.items()]
    if service := result.get("service"):
        facts.append(f"model {service['name']}, {service['arithmetic']}" if service["arithmetic"] else service["name"])
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, *MORE_COLUMNS))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(run)) + "</tr>" for run in result["runs"]
    )
    hints = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes(result["runs"]))
    return (
        f"<h2>{html.escape(result['label'])}</h2><p class=facts>{html.escape(', '.join(facts))}<br>"
        f"<code>{html.escape(result['command'])}</code></p><table><tr>{head}</tr>{rows}</table>{hints}"
        "<p class=facts>Milliseconds; definitions are in docs/speed.md.</p>"
    )


def _cells(run: Mapping[str, Any]) -> list[str]:
    goodput, cores = run.get("goodput"), run["server"]["cores"]
    return [
        load_name(run) + (", stream" if run["load"]["stream"] else ""),
        str(run["repeat"] + 1),
        f"{run['requests_per_s']:.1f}",
        f"{run['tokens_per_s']:.0f}",
        *(ms(run["latency_ms"], name) for name in ("p50", "p90", "p99", "p99.9", "max")),
        *(ms(run.get("ttft_ms"), name) for name in ("p50", "p99")),
        *(ms(run.get("itl_ms"), name) for name in ("p50", "p99")),
        str(run["requests"] - run["statuses"].get("OK", 0)),
        str(len(run["replicas"])),
        f"{run['replica_spread']:.2f}" if run["replica_spread"] else "-",
        f"{run['client']['cores']:.2f}",
        "unknown" if cores is None else f"{cores:.2f}",
        f"{goodput['requests_per_s']:.1f}/s, {goodput['share']:.1%}" if goodput else "-",
    ]

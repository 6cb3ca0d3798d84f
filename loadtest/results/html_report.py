"""Results as one HTML page that contains all its pictures, and the pictures as files beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from loadtest.results import plots
from loadtest.results.table import load_name, ms, notes
from tinylm.system.files import as_png, check_file, check_own, write_file

HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>'
PAGE = """{{ sections|map(attribute="label")|join(", ") }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; } code { font-size: 12px; } .note { color: #8a5a00; } .facts { color: #666; font-size: 13px; }
</style>
{% macro show(pictures) %}{% for name, png in pictures %}
<p><img alt="{{ name }}" src="data:image/png;base64,{{ png }}"></p>{% endfor %}{% endmacro %}
<h1>Load test</h1>{{ show(overview) }}
{% for section in sections %}
<h2>{{ section.label }}</h2>
<p class="facts">{{ section.facts|join(", ") }}<br><code>{{ section.command }}</code></p>
<table><tr>{% for name in section.rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row.values() %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for note in section.notes %}<p class="note">{{ note }}</p>{% endfor %}
<p class="facts">Milliseconds; docs/speed.md defines the figures.</p>{{ show(section.pictures) }}
{% endfor %}
</html>
"""


def write(results: Sequence[Mapping[str, Any]], directory: Path) -> Path:
    """Write report.html and a PNG file for each picture. Return the path of the page.

    Raises FileExistsError, and writes nothing, if one of these files exists and no report wrote it.
    """
    page = directory / "report.html"
    check_own(page, lambda content: content.startswith(HEAD.encode()) and b"<h1>Load test</h1>" in content)
    check_file(page)
    pictures = _Pictures(directory, page.read_text(encoding="utf-8") if page.exists() else "")
    template = Environment(autoescape=True).from_string(PAGE)
    text = template.render(
        overview=pictures.add(_overview(results)),
        sections=[_section(result) | {"pictures": pictures.add(_pictures(result))} for result in results],
    )
    for path, png in pictures.files.items():
        write_file(path, png)
    write_file(page, HEAD + text)
    return page


class _Pictures:
    """The picture files of a report."""

    def __init__(self, directory: Path, old_page: str) -> None:
        """old_page: the report that will be replaced. The pictures that it shows may be replaced too."""
        self._directory, self._old_page = directory, old_page
        self.files: dict[Path, bytes] = {}

    def add(self, figures: Iterator[tuple[str, Figure | None]]) -> list[tuple[str, str]]:
        """Draw figures for files of these names. Return the name and the base64 form of each."""
        added = []
        for name, figure in figures:
            if figure is None:
                continue
            while self._directory / f"{name}.png" in self.files:  # another result has the same label
                name += "-2"
            path = self._directory / f"{name}.png"
            plots.check_picture(path, f'alt="{escape(name)}"' in self._old_page)
            self.files[path] = as_png(figure, plots.DPI)
            added.append((name, base64.b64encode(self.files[path]).decode()))
        return added


def _overview(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure | None]]:
    for stream, kind in ((False, "unary"), (True, "stream")):
        yield f"load-{kind}", plots.against_load(results, stream)
        yield f"replicas-{kind}", plots.against_replicas(results, stream)


def _pictures(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure | None]]:
    slug = re.sub(r"[^\w.-]+", "-", result["label"]).strip("-")
    for quantity in plots.TITLES:
        yield f"{slug}-{quantity}-histogram", plots.histograms(result, quantity)
        yield f"{slug}-{quantity}-percentiles", plots.percentiles(result, quantity)


def _section(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return where and how a result was measured, its runs, and what weakens its figures."""
    machine = result["machine"]
    facts = [result["date"], machine["processor"], f"{machine['cores']} cores", f"revision {result['revision']}"]
    facts += [f"{name} {version}" for name, version in result["versions"].items()]
    if service := result.get("service"):
        facts.append(f"model {service['name']}, {service['arithmetic']}" if service["arithmetic"] else service["name"])
    return {
        "label": result["label"],
        "command": result["command"],
        "facts": facts,
        "rows": [_row(run) for run in result["runs"]],
        "notes": notes(result["runs"]),
    }


def _row(run: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a run by the title of their column."""
    goodput, cores = run.get("goodput"), run["server"]["cores"]
    return {
        "load": load_name(run) + (", stream" if run["load"]["stream"] else ""),
        "run": str(run["repeat"] + 1),
        "req/s": f"{run['requests_per_s']:.1f}",
        "tokens/s": f"{run['tokens_per_s']:.0f}",
        **{f"latency {name}": ms(run["latency_ms"], name) for name in ("p50", "p90", "p99", "p99.9", "max")},
        **{f"ttft {name}": ms(run.get("ttft_ms"), name) for name in ("p50", "p99")},
        **{f"itl {name}": ms(run.get("itl_ms"), name) for name in ("p50", "p99")},
        "not OK": str(run["requests"] - run["statuses"].get("OK", 0)),
        "replicas": str(len(run["replicas"])),
        "spread": f"{run['replica_spread']:.2f}" if run["replica_spread"] else "-",
        "client cores": f"{run['client']['cores']:.2f}",
        "server cores": "unknown" if cores is None else f"{cores:.2f}",
        "goodput": f"{goodput['requests_per_s']:.1f}/s, {goodput['share']:.1%}" if goodput else "-",
    }

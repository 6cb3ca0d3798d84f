"""Results as one HTML page that contains all its pictures, and the pictures as files beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure
from rich.console import Console

from loadtest.results import plots, table
from tinylm.system.files import as_png, check_file, check_own, write_file

HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>'
PAGE = """{{ sections|map(attribute="label")|join(", ") }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { font-size: 12px; line-height: 1.3; overflow-x: auto; }
img { max-width: 100%; } code { font-size: 12px; } .facts { color: #666; font-size: 13px; }
</style>
{% macro show(names) %}{% for name in names %}
<p><img alt="{{ name }}" src="data:image/png;base64,{{ base64[name] }}"></p>{% endfor %}{% endmacro %}
<h1>Load test</h1>{{ show(overview) }}
{% for section in sections %}
<h2>{{ section.label }}</h2>
<p class="facts">{{ section.facts|join(", ") }}<br><code>{{ section.command }}</code></p>
{{ section.tables|safe }}
<p class="facts">docs/speed.md defines the figures.</p>{{ show(section.pictures) }}
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
    pictures: dict[str, bytes] = {}
    overview = _draw(_overview(results), directory, pictures)
    sections = [_section(result) | {"pictures": _draw(_pictures(result), directory, pictures)} for result in results]
    text = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            overview=overview,
            sections=sections,
            base64={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        )
    )
    for name, png in pictures.items():
        write_file(directory / f"{name}.png", png)
    write_file(page, HEAD + text)
    return page


def _draw(figures: Iterator[tuple[str, Figure | None]], directory: Path, pictures: dict[str, bytes]) -> list[str]:
    """Add the figures to `pictures` under names that are still free. Return these names."""
    names = []
    for name, figure in figures:
        if figure is None:
            continue
        while name in pictures:  # another result has the same label
            name += "-2"
        plots.check_picture(directory / f"{name}.png")
        pictures[name] = as_png(figure, plots.DPI)
        names.append(name)
    return names


def _overview(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure | None]]:
    for stream, kind in ((False, "unary"), (True, "stream")):
        yield f"load-{kind}", plots.against_load(results, stream)


def _pictures(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure | None]]:
    slug = re.sub(r"[^\w.-]+", "-", result["label"]).strip("-")
    for quantity in plots.TITLES:
        yield f"{slug}-{quantity}-histogram", plots.histograms(result, quantity)
        yield f"{slug}-{quantity}-percentiles", plots.percentiles(result, quantity)


def _section(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return where and how a result was measured, and its runs as the tables of a terminal."""
    machine = result["machine"]
    facts = [result["date"], machine["processor"], f"{machine['cores']} cores", f"revision {result['revision']}"]
    facts += [f"{name} {version}" for name, version in result["versions"].items()]
    facts.append(f"{result['replicas']} replicas")
    if service := result.get("service"):
        facts.append(f"model {service['name']}, {service['arithmetic']}" if service["arithmetic"] else service["name"])
    console = Console(file=io.StringIO(), record=True, width=120, markup=False, highlight=False, emoji=False)
    table.show(result["runs"], console)
    tables = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return {"label": result["label"], "command": result["command"], "facts": facts, "tables": tables}

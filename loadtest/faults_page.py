"""docs/chaos.md out of docs/results/chaos.json, which `make chaos` measures.

python -m loadtest.faults_page docs/results/chaos.json docs/chaos.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HEAD = """\
# What happens when parts die

`make chaos` starts the service, keeps clients asking, and breaks one part after the other; `SOAK_S=600 make chaos`
ends with a longer load. The clients are `tinylm.client.Client` with its own retries. A request is *answered* with
the text that it must have, *refused* with a status that says to try again (or, where the caller is at fault, what
is wrong), *cut* when a stream breaks after its first piece, and *lost* when it is none of these: another text,
another status, or no end within 20 seconds. None may be lost. *Refused* counts calls that the client itself ended
too: cancelled ones, and those past their own deadline. *Healed* is the time from the fault until every replica runs
and answers.

This page is made by `python -m loadtest.faults_page docs/results/chaos.json docs/chaos.md`.

"""
COLUMNS = {
    "revision": "revision",
    "requests": "requests",
    "answered": "answered",
    "answered_after_retries": "of these after retries",
    "refused": "refused",
    "cut": "cut",
    "lost": "lost",
    "slowest_request_s": "slowest request, s",
    "longest_silence_s": "longest time without an answer, s",
    "healed_s": "healed after, s",
    "memory_growth_mib": "replica's memory, MiB",
}


def page(report: dict) -> str:
    """The page's text; `report` is what tests/chaos/conftest.py writes."""
    machine = report["machine"]
    lines = [
        f"{report['date'][:10]}, {machine['processor']}, {machine['cores']} cores, Ray {report['versions']['ray']}.",
        "",
        f"| fault | {' | '.join(COLUMNS.values())} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
    ]
    for name, figures in report["faults"].items():
        lines.append(f"| {name} | {' | '.join(_cell(key, figures.get(key)) for key in COLUMNS)} |")
    return HEAD + "\n".join(lines) + "\n"


def _cell(key: str, value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:+.1f}" if key == "memory_growth_mib" else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what `make chaos` has measured")
    parser.add_argument("page", type=Path, help="the page to write")
    arguments = parser.parse_args()
    try:
        report = json.loads(arguments.report.read_text(encoding="utf-8"))
        arguments.page.write_text(page(report), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

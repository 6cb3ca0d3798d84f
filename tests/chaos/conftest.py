"""Report every fault at the end, and write the report to the file that CHAOS_REPORT names.

An existing report keeps its other faults, so that one fault can be measured again. After Ctrl-C it stays unchanged.
"""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tinylm.system.machine import describe

FAULTS = pytest.StashKey[dict[str, dict]]()
COLUMNS = ("requests", "answered", "answered_after_retries", "refused", "cut", "lost", "longest_silence_s", "healed_s")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = {}


@pytest.fixture(scope="session")
def faults(request: pytest.FixtureRequest) -> dict[str, dict]:
    """Name of a fault -> its account by `fault_load`, with `healed_s`, the time from the fault to full health."""
    return request.config.stash[FAULTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    faults = config.stash[FAULTS]
    if not faults:
        return
    table = Table("fault", *(column.replace("_", " ") for column in COLUMNS))
    for name, figures in faults.items():
        table.add_row(name, *(str(figures.get(column, "")) for column in COLUMNS))
    console = Console(file=io.StringIO(), width=140)
    console.print(table)
    terminalreporter.write_line(console.file.getvalue())
    path = os.environ.get("CHAOS_REPORT")
    if path and exitstatus != pytest.ExitCode.INTERRUPTED:
        report = Path(path)
        before = json.loads(report.read_text(encoding="utf-8"))["faults"] if report.exists() else {}
        when = {key: describe()[key] for key in ("date", "revision")}
        dated = {name: {**figures, **when} for name, figures in faults.items()}
        text = json.dumps({"command": "make chaos", **describe(), "faults": before | dated}, indent=2)
        report.write_text(text + "\n", encoding="utf-8")

"""docs/chaos.md is what its results make of it."""

import json
from pathlib import Path

from loadtest.faults_page import page


def test_the_page_on_faults_is_that_of_the_committed_results() -> None:
    report = json.loads(Path("docs/results/chaos.json").read_text(encoding="utf-8"))
    assert Path("docs/chaos.md").read_text(encoding="utf-8") == page(report)

"""docs/speed.md is what the committed results of the standard set make of it."""

from pathlib import Path

from loadtest.standard.page import page


def test_the_page_on_speed_is_that_of_the_committed_results() -> None:
    assert Path("docs/speed.md").read_text(encoding="utf-8") == page()

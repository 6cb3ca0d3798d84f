"""The blocks of a page that results fill."""

import pytest

from loadtest.bench.markdown import fill


def test_fill_replaces_only_the_blocks() -> None:
    page = "before\n<!-- results: a -->\nold\n\nold\n<!-- end -->\nbetween\n<!-- results: b -->\n<!-- end -->\nafter\n"
    filled = fill(page, {"a": "1", "b": r"\1 | 2"})
    assert filled == page.replace("old\n\nold\n", "1\n").replace("b -->\n", "b -->\n\\1 | 2\n")
    assert fill(filled, {"a": "1", "b": r"\1 | 2"}) == filled


@pytest.mark.parametrize("blocks", [{}, {"a": "1", "b": "2"}, {"b": "2"}])
def test_fill_refuses_missing_or_unknown_blocks(blocks: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="the page has the blocks"):
        fill("<!-- results: a -->\nold\n<!-- end -->\n", blocks)

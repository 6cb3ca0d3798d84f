"""Put results into Markdown pages. The prose of a page is written by hand; only its blocks are generated.

A block is the text between the lines `<!-- results: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BLOCK = re.compile(r"^<!-- results: (\S+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Return the page with the text of every block replaced by `blocks[NAME]`.

    Raises ValueError if the blocks of the page are not exactly those given.
    """
    names = [match[1] for match in BLOCK.finditer(page)]
    if sorted(names) != sorted(blocks):
        raise ValueError(f"the page has the blocks {sorted(names)}: it must have each of {sorted(blocks)} once")
    return BLOCK.sub(lambda match: f"<!-- results: {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->", page)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. All columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

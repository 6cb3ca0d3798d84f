"""Write docs/how-it-works.md from its template, the committed results and excerpts of the code.

python -m docs.making.page
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from docs.making.pictures import load_results
from tinylm.system.files import write_file
from tinylm.system.text_files import lines_of, read_text

TEMPLATE = Path("docs/making/how-it-works.md.j2")
OUT = Path("docs/how-it-works.md")


def excerpt(path: str, first: str, last: str, after: str = "") -> str:
    """Return lines of a file as a fenced block: from one that begins with `first` to the next that begins with `last`.

    The search starts at the first line that contains `after`. Raises ValueError if the file has no such lines.
    """
    lines = lines_of(read_text(Path(path)))
    try:
        start = next(i for i, line in enumerate(lines) if after in line)
        begin = next(i for i in range(start, len(lines)) if lines[i].startswith(first))
        end = next(i for i in range(begin, len(lines)) if lines[i].startswith(last))
    except StopIteration:
        raise ValueError(f"{path} has no lines from {first!r} to {last!r} after {after!r}") from None
    return "```python\n" + textwrap.dedent("\n".join(lines[begin : end + 1])) + "\n```"


def render() -> str:
    """Return the page."""
    results = load_results()
    pictures, bench = results["pictures"], results["bench"]
    served = next(row for row in results["quantization"]["formats"] if row["arithmetic"] == "as served")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **pictures,
        bench=bench,
        batch={row["batch"]: row for row in bench["decode"]},
        lens_last=[ranks[-1] for ranks in pictures["inside"]["lens"]["ranks"]],
        loss_rows=(-3, -2, -1),
        cost_of_int8=served["collections"]["tinystories"]["more_than_float32"],
        code=excerpt,
        log=math.log,
        n=lambda number: f"{number:,.0f}",
        ms=lambda number: f"{number:.2f}",
    )


def main() -> None:
    write_file(OUT, render())
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

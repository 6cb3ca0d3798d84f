"""Print the story on standard output, and notes and errors on standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinylm.sampling import TokenLogprobs
from tinylm.terminal.output import PlainConsole

_STYLES = ((0.8, "green"), (0.4, "yellow"), (0.1, "dark_orange"), (0.0, "red"))  # the least probability of a colour
LEGEND = "tokens by probability: green from 0.8, yellow from 0.4, orange from 0.1, red below"


class Screen:
    def __init__(self) -> None:
        self._story = PlainConsole()
        self._about = PlainConsole(stderr=True)
        self._in_line = False  # whether the last line of the story has no line end yet

    def story(self, text: str, logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Print more of the story at once. With logprobs, the colour shows the probability of its tokens."""
        self._story.write(text, end="", style=style_of(logprobs))
        if text:
            self._in_line = not text.endswith("\n")

    def about(self, text: str) -> None:
        self.end_line()
        self._about.write(text, style="dim")

    def error(self, text: str) -> None:
        self.end_line()
        self._about.write(f"error: {text}", style="red")

    def end_line(self) -> None:
        if self._in_line:
            self._story.write("")
            self._in_line = False


def style_of(logprobs: Sequence[TokenLogprobs]) -> str | None:
    """Return the colour for a piece of text, from the geometric mean of its tokens' probabilities."""
    if not logprobs:
        return None
    probability = math.exp(sum(entry.logprob for entry in logprobs) / len(logprobs))
    return next(style for least, style in _STYLES if probability >= least)

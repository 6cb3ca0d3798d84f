"""What the story prompt prints: the story on standard output, everything about it, dim or red, on standard error.

Colours are Rich's business: none where there is no terminal or NO_COLOR is set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from tinylm.sampling import TokenLogprobs

_STYLES = ((0.8, "green"), (0.4, "yellow"), (0.1, "dark_orange"), (0.0, "red"))  # from this probability on
LEGEND = "tokens by probability: green from 0.8, yellow from 0.4, orange from 0.1, red below"


class Screen:
    def __init__(self) -> None:
        self._story = Console(highlight=False)
        self._about = Console(stderr=True, highlight=False)
        self._in_line = False  # whether the story's last line is open

    def story(self, text: str, logprobs: Sequence[TokenLogprobs] = ()) -> None:
        """Show more of the story at once, in the colour of its tokens' probability if their logprobs are given."""
        text = printable(text)
        self._story.out(text, end="", highlight=False, style=style_of(logprobs))
        self._story.file.flush()
        if text:
            self._in_line = not text.endswith("\n")

    def about(self, text: str) -> None:
        self.end_line()
        self._about.out(text, style="dim", highlight=False)

    def error(self, text: str) -> None:
        self.end_line()
        self._about.out(f"error: {printable(text)}", style="red", highlight=False)

    def end_line(self) -> None:
        if self._in_line:
            self._story.out("")
            self._in_line = False


def style_of(logprobs: Sequence[TokenLogprobs]) -> str | None:
    """By the geometric mean of the probabilities, for a piece of several tokens."""
    if not logprobs:
        return None
    probability = math.exp(sum(entry.logprob for entry in logprobs) / len(logprobs))
    return next(style for least, style in _STYLES if probability >= least)


def printable(text: str) -> str:
    """The text without what a terminal would obey: a model may write any character, escape sequences too."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)

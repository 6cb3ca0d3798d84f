"""A story in turns, each a typed line and the model's text, and the part of it that fits into the model's context."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_JOINED = tuple(".,;:!?)\u201d\u2019")  # these follow a word without a space
_BEGINNINGS = (re.compile(r"(?<=[.!?\"'\u201d\u2019])\s+(?=\S)|\n+"), re.compile(r"\s+"))  # of a sentence, of a word
_FIRST_CHARS_PER_TOKEN = 8  # more than English text has
_SPARE_TOKENS = 4  # the end of a text may have a few more tokens alone than within the text


@dataclass(slots=True)
class Turn:
    typed: str
    written: str = ""


@dataclass(slots=True)
class Story:
    turns: list[Turn] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(turn.typed + turn.written for turn in self.turns)

    def add(self, line: str) -> Turn:
        """Begin a turn with a line. Put a space before it where English text has one."""
        before = self.text
        apart = line and before and not before[-1].isspace() and not line[0].isspace() and not line.startswith(_JOINED)
        self.turns.append(Turn(f" {line}" if apart else line))
        return self.turns[-1]


def visible_end(text: str, token_bytes: Callable[[str], list[bytes]], n_tokens: int) -> str:
    """Return the end of a text in at most `n_tokens` tokens, from the start of a sentence, or else of a word.

    Such a start costs at most half of the tokens. Tokenize no more of the end than needed: a service refuses long
    texts.
    """
    if len(text.encode()) <= n_tokens:  # a token has at least one byte
        return text
    n_chars = _FIRST_CHARS_PER_TOKEN * n_tokens
    while len(pieces := token_bytes(text[-n_chars:])) <= n_tokens:
        if n_chars >= len(text):
            return text
        n_chars *= 2
    kept = pieces[-max(n_tokens - _SPARE_TOKENS, 1) :]
    end = b"".join(kept).decode(errors="ignore")
    half = len(b"".join(kept[: len(kept) // 2]).decode(errors="ignore"))
    for beginning in _BEGINNINGS:
        if match := beginning.search(end, 0, half):
            return end[match.end() :]
    return end

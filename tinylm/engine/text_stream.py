"""Tokens into text as they come: whole characters only, and nothing that a stop string may still take back.

However tokens are cut, the pieces joined are the whole text, ended before the first stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tinylm.tokenizer import Tokenizer


class TextStream:
    """Feed token ids with `push`, take the text that is certain; `stopped` tells that a stop string has been met."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with these tokens; '' once stopped."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes(tokens)), final=False)

    def finish(self) -> str:
        """The text that was held back when the tokens end; bytes of an unfinished character become U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        if match := earliest_stop(self._held, self._stop):
            self.stopped = True
            certain, self._held = self._held[: match[0]], ""
            return certain
        keep = 0 if final else self._could_begin_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _could_begin_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def earliest_stop(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first (of several, the one that began first), or None.

    ('a END b STOP', ['STOP', 'END']) -> (2, 5)
    """
    found = [(start + len(s), start) for s in stop if (start := text.find(s)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end

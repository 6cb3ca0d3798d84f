"""Turn tokens into text as they come. Hold back incomplete characters and text that can begin a stop string.

The pieces joined are the text before the first stop string, however the tokens are grouped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tinylm.tokenizer import Tokenizer


class TextStream:
    """Takes token ids by `push` and returns the text that is certain. `stopped`: a stop string has ended the text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self._n_passed = 0  # no stop string ends within this many characters of the held text
        self.stopped = False

    def push(self, tokens: Sequence[int], may_stop: bool = True) -> str:
        """Return the text that these tokens make certain. Return "" after a stop string.

        may_stop: whether a stop string that these tokens complete ends the text.
        """
        text = self._decoder.decode(self._tokenizer.decode_bytes(tokens))
        if not may_stop:
            self._n_passed = len(self._held) + len(text)
        return self._release(text, final=False)

    def finish(self) -> str:
        """Return the text that was held back. Replace the bytes of an unfinished character by U+FFFD."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        end = _end_before_stop(self._held, self._stop, self._n_passed)
        if end is not None:
            self.stopped = True
            certain, self._held = self._held[:end], ""
            return certain
        keep = 0 if final else self._could_begin_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._n_passed = max(0, self._n_passed - len(certain))
        return certain

    def _could_begin_stop(self) -> int:
        """Return the length of the longest end of the held text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


def _end_before_stop(text: str, stop: Sequence[str], n_passed: int) -> int | None:
    """Return where the text must end: before the stop string that is complete first. Return None without a stop string.

    Stop strings that are complete within the first `n_passed` characters don't count. If several are complete at the
    same character, the text ends before the longest of them.

    ('a END b STOP', ['STOP', 'END'], 0) -> 2
    """
    found = [(start + len(s), start) for s in stop if (start := text.find(s, max(0, n_passed - len(s) + 1))) >= 0]
    return min(found)[1] if found else None

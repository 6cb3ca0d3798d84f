"""How a document that is longer than the context is read: in windows that overlap by half."""

from __future__ import annotations

from collections.abc import Iterator


def windows(n_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first) of each window of a document: ids[start:end] go in, targets ids[first:end + 1] count.

    Together the windows have each token but the one at 0 as a target once, and beyond the first half context every
    target has at least that much before it.
    """
    start, first = 0, 1
    while first < n_tokens:
        end = min(start + context, n_tokens - 1)
        yield start, end, first
        first = end + 1
        start += context // 2

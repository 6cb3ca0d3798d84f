"""The documents of one collection as training rows. A row is a function of documents, context, seed and number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from pathlib import Path

import numpy as np


class Documents:
    """All documents of one collection and split, memory-mapped. Each begins with the boundary token."""

    def __init__(self, paths: list[Path], boundary_id: int) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        shard, start, length = [], [], []
        for number, tokens in enumerate(self._shards):
            starts = np.flatnonzero(tokens == boundary_id)
            shard.append(np.full(len(starts), number))
            start.append(starts)
            length.append(np.diff(np.append(starts, len(tokens))))
        self._shard, self._start, self.lengths = (np.concatenate(parts) for parts in (shard, start, length))

    def __len__(self) -> int:
        return len(self.lengths)

    def of_at_most(self, n_tokens: int) -> Documents:
        """Return only the documents of at most `n_tokens` tokens, in the same order."""
        short, kept = copy(self), self.lengths <= n_tokens
        short._shard, short._start, short.lengths = self._shard[kept], self._start[kept], self.lengths[kept]
        return short

    def tokens(self, i: int) -> np.ndarray:
        """Return the i-th document, (lengths[i],) uint16."""
        start = self._start[i]
        return self._shards[self._shard[i]][start : start + self.lengths[i]]


class Rows:
    """Rows of context + 1 tokens: inputs, and targets one token later. Each epoch shuffles the documents again.

    A document that fits into a row is never cut, because users ask for whole stories (Ding et al. 2024, "Fewer
    truncations improve language modeling"). If a row ends inside a document that began in that row, the next row starts
    at the beginning of that document. A longer document continues from row to row.
    """

    def __init__(self, documents: Documents, context: int, seed: tuple[int, ...]) -> None:
        self._documents = documents
        self.context = context
        self._seed = seed
        self.epoch_tokens = int(documents.lengths.sum())
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self._starts = lru_cache(maxsize=2)(self._lay_out)
        self._first_rows = [0]  # of each epoch so far

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in the epoch's order, and the epoch's token at which each of them ends, (D,) each."""
        order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._documents))
        return order, np.cumsum(self._documents.lengths[order])

    def _lay_out(self, epoch: int) -> list[int]:
        """Return the epoch's token at which each row starts."""
        begins = [0, *self._order(epoch)[1].tolist()]  # of each document, and the end of the last
        starts = [0]
        while (end := starts[-1] + self.context) < self.epoch_tokens:
            begin = begins[bisect_right(begins, end) - 1]  # of the document that the row's end cuts
            starts.append(begin if begin > starts[-1] else end)
        return starts

    def _place(self, row: int) -> tuple[int, int]:
        """Return the row's epoch and its number in that epoch."""
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + len(self._starts(len(self._first_rows) - 1)))
        epoch = bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]

    def row(self, number: int) -> np.ndarray:
        """Return a row, (context + 1,) int64. The last row of an epoch takes its missing tokens from the next epoch."""
        parts = [self._documents.tokens(document)[part] for document, part in self._parts(number)]
        return np.concatenate(parts, dtype=np.int64)

    def _parts(self, number: int) -> Iterator[tuple[int, slice]]:
        """Yield the parts of a row in order, as (document, slice of it)."""
        n_tokens = self.context + 1
        epoch, place = self._place(number)
        start = self._starts(epoch)[place]
        while n_tokens:
            order, ends = self._order(epoch)
            i = int(np.searchsorted(ends, start, side="right"))
            length = int(self._documents.lengths[order[i]])
            first = start - int(ends[i]) + length
            n = min(length - first, n_tokens)
            yield int(order[i]), slice(first, first + n)
            n_tokens -= n
            start += n
            if start == self.epoch_tokens:
                epoch, start = epoch + 1, 0

    def epochs(self, rows: int) -> float:
        """Return the number of epochs in the first `rows` rows."""
        epoch, place = self._place(rows)
        return epoch + place / len(self._starts(epoch))

"""The rows of several collections in the order in which training reads them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from train.config import ConfigError
from train.data.rows import Rows

BLOCK = 1000  # rows


class Mixture:
    """Rows of several collections, drawn by weight. Row number j is a function of the arguments and j.

    The collections follow each other in a shuffled block of BLOCK rows, which repeats. A block has exact shares. From
    row `final_row` on, the collections in `final` give those rows instead.
    """

    def __init__(
        self,
        collections: dict[str, Rows],
        weights: dict[str, float],
        seed: int,
        final: Mapping[str, Rows] = MappingProxyType({}),
        final_row: int = 0,
    ) -> None:
        self._names = list(collections)
        self._collections = list(collections.values())
        shares = {name: weights.get(name, 0.0) for name in collections}
        block = np.repeat(np.arange(len(shares)), _rows_in_block(shares))
        self._block = np.random.default_rng((seed, 0)).permutation(block)  # (BLOCK,) collection of each row
        one_hot = self._block[:, None] == np.arange(len(shares))
        self._before = np.cumsum(one_hot, axis=0) - one_hot  # (BLOCK, C) earlier rows of each in the block
        self._per_block = one_hot.sum(axis=0)  # (C,)
        self._final = [final.get(name) for name in self._names]
        self._before_final = self._counts(final_row)  # (C,)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return rows first..first+count-1, (count, context + 1) int64."""
        return np.stack([self._row(number) for number in range(first, first + count)])

    def collections(self, first: int, count: int) -> list[str]:
        """Return the name of the collection of each of these rows."""
        return [self._names[self._collection(number)] for number in range(first, first + count)]

    def _row(self, number: int) -> np.ndarray:
        collection = self._collection(number)
        i, n_before = int(self._counts(number)[collection]), int(self._before_final[collection])
        final = self._final[collection]
        return final.row(i - n_before) if final and i >= n_before else self._collections[collection].row(i)

    def _collection(self, number: int) -> int:
        return int(self._block[number % BLOCK])

    def _counts(self, rows: int) -> np.ndarray:
        """Return the number of rows of each collection among the first `rows` rows, (C,)."""
        blocks, i = divmod(rows, BLOCK)
        return blocks * self._per_block + self._before[i]

    def tokens(self, rows: int) -> dict[str, int]:
        """Return the tokens of each collection in the first `rows` rows; a token of two rows counts twice."""
        collections = zip(self._names, self._collections, self._counts(rows), strict=True)
        return {name: int(n) * collection.context for name, collection, n in collections}

    def epochs(self, rows: int) -> dict[str, float]:
        """Return the epochs of each collection in the first `rows` rows. Final rows count by their tokens."""
        counts = self._counts(rows).tolist()
        return {name: self._epochs(i, counts[i]) for i, name in enumerate(self._names)}

    def _epochs(self, collection: int, rows: int) -> float:
        everything, final = self._collections[collection], self._final[collection]
        n_before = min(rows, int(self._before_final[collection])) if final else rows
        epochs = everything.epochs(n_before)
        if final and rows > n_before:
            epochs += final.epochs(rows - n_before) * final.epoch_tokens / everything.epoch_tokens
        return epochs


def _rows_in_block(shares: dict[str, float]) -> np.ndarray:
    """Return the rows of each collection in a block, (C,); raise ConfigError when a share is less than a row."""
    weights = np.array(list(shares.values()))
    ends = np.round(np.cumsum(weights / weights.sum()) * BLOCK).astype(int)
    counts = np.diff(ends, prepend=0)
    for name, weight, rows in zip(shares, weights, counts, strict=True):
        if weight and not rows:
            raise ConfigError(
                f"collection {name!r} has a weight of {weight:g} of {weights.sum():g}: "
                f"too little for a row in {BLOCK}; give it 0, or more"
            )
    return counts

"""Token shards into training rows and validation windows, in an order that the step number alone decides.

Nothing is kept between steps: row number j of a run is a pure function of (shards, mixture, seed, j), so a run that
is killed and resumed, or continued with another number of workers, sees exactly the rows it would have seen.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from train.config import INDEX_FILE, ConfigError

MIXTURE_BLOCK = 1000  # rows over which the mixture's weights hold exactly (to a row)


class Documents:
    """All documents of one collection and split, memory-mapped: `tokens(i)` is the i-th, its boundary first."""

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

    def tokens(self, i: int) -> np.ndarray:
        """The i-th document, (lengths[i],) uint16."""
        start = self._start[i]
        return self._shards[self._shard[i]][start : start + self.lengths[i]]


class Rows:
    """A collection as rows of one context and one token more, its documents shuffled anew every epoch.

    A document that fits stands in a row whole, as it will be read when the model is used (Ding et al. 2024, "Fewer
    truncations improve language modeling"): after a row that ends within a document that it did not begin with comes
    one that begins with it. A longer one is read from row to row.
    """

    def __init__(self, documents: Documents, context: int, seed: tuple[int, ...]) -> None:
        self._documents = documents
        self._context = context
        self._seed = seed
        self.epoch_tokens = int(documents.lengths.sum())
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self._starts = lru_cache(maxsize=2)(self._lay_out)
        self._first_rows = [0]  # of each epoch so far

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(D,) documents in the epoch's order, and (D,) where each ends in it."""
        order = np.random.default_rng((*self._seed, epoch)).permutation(len(self._documents))
        return order, np.cumsum(self._documents.lengths[order])

    def _lay_out(self, epoch: int) -> list[int]:
        """Where each row of the epoch begins among its tokens."""
        begins = [0, *self._order(epoch)[1].tolist()]  # of each document, and the end of all
        starts = [0]
        while (end := starts[-1] + self._context) < self.epoch_tokens:
            begin = begins[bisect_right(begins, end) - 1]  # of the document that goes on there
            starts.append(begin if begin > starts[-1] else end)
        return starts

    def _place(self, row: int) -> tuple[int, int]:
        """(epoch, row in it) of the collection's row."""
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + len(self._starts(len(self._first_rows) - 1)))
        epoch = bisect_right(self._first_rows, row) - 1
        return epoch, row - self._first_rows[epoch]

    def row(self, number: int) -> np.ndarray:
        """(context + 1,) int64: inputs and, one on, their targets. An epoch's last row is filled up from the next."""
        parts = [self._documents.tokens(document)[place] for document, place in self._parts(number)]
        return np.concatenate(parts, dtype=np.int64)

    def _parts(self, number: int) -> Iterator[tuple[int, slice]]:
        """Yield the row's tokens in order, as (document, slice of it)."""
        n_tokens = self._context + 1
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
        """How often the collection has been gone through after so many rows."""
        epoch, place = self._place(rows)
        return epoch + place / len(self._starts(epoch))


class Mixture:
    """Rows of several collections, drawn by weight.

    The order of the collections is a shuffled block of MIXTURE_BLOCK rows, repeated. The shares of a block are exact.
    """

    def __init__(self, collections: dict[str, Rows], weights: dict[str, float], context: int, seed: int) -> None:
        self.names = list(collections)
        self._collections = list(collections.values())
        self._context = context
        shares = np.array([weights.get(name, 0.0) for name in collections])
        ends = np.round(np.cumsum(shares / shares.sum()) * MIXTURE_BLOCK).astype(int)
        for name, share, rows in zip(collections, shares, np.diff(ends, prepend=0), strict=True):
            if share and not rows:
                raise ConfigError(
                    f"collection {name!r} has a weight of {share:g} of {shares.sum():g}: "
                    f"too little for a row in {MIXTURE_BLOCK}; give it 0, or more"
                )
        block = np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0))
        self._block = np.random.default_rng((seed, 0)).permutation(block)  # (MIXTURE_BLOCK,) collection of each row
        one_hot = self._block[:, None] == np.arange(len(shares))
        self._before = np.cumsum(one_hot, axis=0) - one_hot  # (MIXTURE_BLOCK, C) earlier rows of each in the block
        self._per_block = one_hot.sum(axis=0)  # (C,)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return rows first..first+count-1, (count, context + 1) int64: the inputs, and one token on, their targets."""
        return np.stack([self._row(number) for number in range(first, first + count)])

    def collections(self, first: int, count: int) -> list[str]:
        """Return the name of the collection of each of these rows."""
        return [self.names[self._collection(number)] for number in range(first, first + count)]

    def _row(self, number: int) -> np.ndarray:
        collection = self._collection(number)
        return self._collections[collection].row(int(self._counts(number)[collection]))

    def _collection(self, number: int) -> int:
        return int(self._block[number % MIXTURE_BLOCK])

    def _counts(self, rows: int) -> np.ndarray:
        """Return how many of the first `rows` rows each collection has, (C,)."""
        blocks, i = divmod(rows, MIXTURE_BLOCK)
        return blocks * self._per_block + self._before[i]

    def tokens(self, rows: int) -> dict[str, int]:
        """Return how many tokens of each collection the first `rows` rows hold; one that two rows hold counts twice."""
        return {name: int(n) * self._context for name, n in zip(self.names, self._counts(rows), strict=True)}

    def epochs(self, rows: int) -> dict[str, float]:
        """Return how many epochs of each collection the first `rows` rows hold."""
        collections = zip(self.names, self._collections, self._counts(rows), strict=True)
        return {name: collection.epochs(int(n)) for name, collection, n in collections}


def read_tokens(directory: Path) -> tuple[dict, dict[str, dict[str, Documents]]]:
    """Return the index that `train.encode` wrote, and its documents by split ("train", "validation") and collection.

    Raises ConfigError when a file is damaged.
    """
    documents: dict[str, dict[str, Documents]] = {"train": {}, "validation": {}}
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        for name, entry in index["collections"].items():
            for split, part in entry.items():
                shards = [directory / shard for shard in part["shards"]]
                documents[split][name] = Documents(shards, index["boundary_id"])
    except (EOFError, ValueError) as error:  # NumPy's and JSON's of files that were cut off
        raise ConfigError(f"{directory} is damaged, make it again: {error}") from None
    return index, documents


class TokenData:
    """What `python -m train.encode` wrote: the mixture to train on and the windows to validate on.

    weights: by collection, in any unit; a collection of weight 0 is validated on only. Raises ConfigError when a
    collection with a weight has no tokens, or too few.
    """

    def __init__(self, directory: Path, context: int, seed: int, weights: dict[str, float]) -> None:
        index, self._documents = read_tokens(directory)
        self.vocab_size: int = index["vocab_size"]
        self.boundary_id: int = index["boundary_id"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.text_sha256: str = index["text_sha256"]  # of the text's manifest, which holds the sums of all text
        self._context = context
        trained = self._documents["train"]
        if missing := sorted(name for name, weight in weights.items() if weight and name not in trained):
            raise ConfigError(
                f"collection {missing[0]!r} is to be trained on, but {directory} has no tokens of it to train on: "
                f"run `python -m train.prepare` and what follows it again"
            )
        collections = {name: Rows(documents, context, (seed, i)) for i, (name, documents) in enumerate(trained.items())}
        if short := [name for name, rows in collections.items() if rows.epoch_tokens <= context]:
            raise ConfigError(
                f"collection {short[0]!r} has fewer tokens than one row of {context + 1}: too little text"
            )
        self.mixture = Mixture(collections, weights, context, seed)

    @property
    def validation_collections(self) -> list[str]:
        return list(self._documents["validation"])

    def validation_rows(self, collection: str, count: int) -> np.ndarray:
        """The first windows of held-out documents, each document from its start, (<= count, context + 1) int64.

        A window shorter than the context is filled up with -1, which counts as nothing.
        """
        documents = self._documents["validation"][collection]
        rows: list[np.ndarray] = []
        for i in range(len(documents)):
            tokens = documents.tokens(i).astype(np.int64)
            for start in range(0, len(tokens) - 1, self._context):
                row = np.full(self._context + 1, -1, np.int64)
                part = tokens[start : start + self._context + 1]
                row[: len(part)] = part
                rows.append(row)
                if len(rows) == count:
                    return np.stack(rows)
        return np.stack(rows)

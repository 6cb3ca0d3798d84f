"""Token shards into training rows and validation windows, in an order that the step number alone decides.

Nothing is kept between steps: row number j of a run is a pure function of (shards, mixture, seed, j), so a run that
is killed and resumed, or continued with another number of workers, sees exactly the rows it would have seen.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from train.config import INDEX_FILE, ConfigError, Lengths, Phase
from train.soft_targets import N_SOFT, SoftTargets, read_index, read_soft_targets

OF_TOKENS = ("text_sha256", "tokenizer_sha256", "vocab_size", "boundary_id")  # what an index says of them all
MIXTURE_BLOCK = 1000  # rows over which the mixture's weights hold exactly (to a row)


class Documents:
    """All documents of one collection and split, memory-mapped: `tokens(i)` is the i-th, its boundary first."""

    def __init__(self, paths: list[Path], boundary_id: int) -> None:
        self.paths = paths
        self._shards = [np.load(path, mmap_mode="r") for path in paths]
        self._soft: list[SoftTargets] = []
        shard, start, length = [], [], []
        for number, tokens in enumerate(self._shards):
            starts = np.flatnonzero(tokens == boundary_id)
            shard.append(np.full(len(starts), number))
            start.append(starts)
            length.append(np.diff(np.append(starts, len(tokens))))
        self._shard, self._start, self.lengths = (np.concatenate(parts) for parts in (shard, start, length))

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, lengths: Lengths) -> Documents:
        """Those of such lengths, in the same order."""
        chosen = (self.lengths >= lengths.least) & (self.lengths <= lengths.most)
        part = copy(self)
        part._shard, part._start, part.lengths = (a[chosen] for a in (self._shard, self._start, self.lengths))
        return part

    def taught(self, directory: Path) -> Documents:
        """The same with what `train.teach` wrote of them; raises ConfigError when it didn't, or of other tokens."""
        with_soft = copy(self)
        with_soft._soft = [read_soft_targets(directory, path) for path in self.paths]
        return with_soft

    def tokens(self, i: int) -> np.ndarray:
        """The i-th document, (lengths[i],) uint16."""
        return self._shards[self._shard[i]][self._place(i)]

    @property
    def are_taught(self) -> bool:
        return bool(self._soft)

    def soft_targets(self, i: int) -> SoftTargets:
        """What is said of the token after each of the i-th document's, (lengths[i], N_SOFT) each, where any is."""
        place = self._place(i)
        ids, probabilities = self._soft[self._shard[i]]
        return SoftTargets(ids[place], probabilities[place])

    def _place(self, i: int) -> slice:
        """Where the document lies in its shard."""
        return slice(self._start[i], self._start[i] + self.lengths[i])


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
        parts = [self._documents.tokens(document)[place] for document, place in self._parts(number, self._context + 1)]
        return np.concatenate(parts, dtype=np.int64)

    def soft_targets(self, number: int) -> SoftTargets:
        """What is said of the row's targets, (context, N_SOFT) int64 and float32; nothing, so zeros, if nothing is."""
        if not self._documents.are_taught:
            shape = (self._context, N_SOFT)
            return SoftTargets(np.zeros(shape, np.int64), np.zeros(shape, np.float32))
        ids, probabilities = [], []
        for document, place in self._parts(number, self._context):
            of_document = self._documents.soft_targets(document)
            ids.append(of_document.ids[place])
            probabilities.append(of_document.probabilities[place])
        return SoftTargets(np.concatenate(ids, dtype=np.int64), np.concatenate(probabilities, dtype=np.float32))

    def _parts(self, number: int, n_tokens: int) -> Iterator[tuple[int, slice]]:
        """The row's first tokens, as (document, where in it)."""
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


class _Pattern:
    """Which collection each row of a stretch belongs to: a shuffled block, repeated, in which the shares are exact."""

    def __init__(self, weights: dict[str, float], seed: int) -> None:
        shares = np.array(list(weights.values()))
        ends = np.round(np.cumsum(shares / shares.sum()) * MIXTURE_BLOCK).astype(int)
        for name, share, rows in zip(weights, shares, np.diff(ends, prepend=0), strict=True):
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

    def collection(self, row: int) -> int:
        return int(self._block[row % MIXTURE_BLOCK])

    def counts(self, rows: int) -> np.ndarray:
        """(C,) rows of each collection among the first so many."""
        blocks, i = divmod(rows, MIXTURE_BLOCK)
        return blocks * self._per_block + self._before[i]


class Mixture:
    """Rows of one context and one token more, drawn from several collections by weights that may change on the way.

    phases: (the first row for which they hold, weights by name), in order, in place of `weights`. parts: of which
    collection one that is drawn from is a part, under whose name it then counts.
    """

    def __init__(
        self,
        collections: dict[str, Rows],
        weights: dict[str, float],
        context: int,
        seed: int,
        phases: Sequence[tuple[int, dict[str, float]]] = (),
        parts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.names = [name for name in collections if name not in parts]
        self._drawn = list(collections.items())
        self._whole = [parts.get(name, name) for name in collections]
        self._context = context
        self._first_rows: list[int] = []
        self._phases: list[tuple[_Pattern, np.ndarray]] = []  # and the rows of each collection before it
        for first, shares in ([] if phases and phases[0][0] == 0 else [(0, weights)]) + list(phases):
            before = self._counts(first)
            pattern = _Pattern({name: shares.get(name, 0.0) for name in collections}, seed)
            self._first_rows.append(first)
            self._phases.append((pattern, before))

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows first..first+count-1 of the run, (count, context + 1) int64: inputs and, one on, their targets."""
        return np.stack([rows.row(number) for rows, number in map(self._drawn_row, range(first, first + count))])

    def collections(self, first: int, count: int) -> list[str]:
        """Which collection each of the same rows is from."""
        return [self._whole[self._collection(number)] for number in range(first, first + count)]

    def soft_targets(self, first: int, count: int) -> SoftTargets:
        """What other models say of the same rows' targets, (count, context, N_SOFT) each; zeros where they don't."""
        said = [rows.soft_targets(number) for rows, number in map(self._drawn_row, range(first, first + count))]
        return SoftTargets(*map(np.stack, zip(*said, strict=True)))

    def _drawn_row(self, number: int) -> tuple[Rows, int]:
        """Of which collection the run's row is, and its number there."""
        collection = self._collection(number)
        return self._drawn[collection][1], int(self._counts(number)[collection])

    def _collection(self, number: int) -> int:
        phase = bisect_right(self._first_rows, number) - 1
        return self._phases[phase][0].collection(number - self._first_rows[phase])

    def _counts(self, rows: int) -> np.ndarray:
        """(C,) rows of each collection among the first so many of the run."""
        if not self._phases:
            return np.zeros(len(self._drawn), int)
        phase = bisect_right(self._first_rows, rows) - 1
        pattern, before = self._phases[phase]
        return before + pattern.counts(rows - self._first_rows[phase])

    def tokens(self, rows: int) -> dict[str, int]:
        """Tokens of each collection among so many rows, also those that it read again as a row began."""
        tokens = dict.fromkeys(self.names, 0)
        for name, n in zip(self._whole, self._counts(rows), strict=True):
            tokens[name] += int(n) * self._context
        return tokens

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each collection was gone through after so many rows, and each part, which counts for itself."""
        counts = zip(self._drawn, self._counts(rows), strict=True)
        return {name: collection.epochs(int(n)) for (name, collection), n in counts}


def read_tokens(directory: Path) -> tuple[dict, dict[str, dict[str, Documents]]]:
    """What `train.encode` or `train.tell` wrote: its index, and by split ("train", "validation") and collection.

    Raises ConfigError when a file of it is damaged.
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

    weights: by collection, in any unit; one of 0 is validated on only. told: where `train.tell` wrote, one collection
    more to train on. taught: where `train.teach` wrote what other models say of some collections. Raises ConfigError
    where one that is to be trained on has no tokens, or too few, and where what was told or said is of other tokens.
    """

    def __init__(
        self,
        directory: Path,
        context: int,
        seed: int,
        weights: dict[str, float],
        phases: Sequence[Phase] = (),
        told: Path | None = None,
        taught: Path | None = None,
        taught_collections: Collection[str] = (),
    ) -> None:
        index, self._documents = read_tokens(directory)
        self.vocab_size: int = index["vocab_size"]
        self.boundary_id: int = index["boundary_id"]
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.text_sha256: str = index["text_sha256"]  # of the text's manifest, which holds the sums of all text
        self._context = context
        self.told_by: dict[str, str] = {}  # names of models by the sha256 of the file with their weights
        if told:
            told_index, documents = read_tokens(told)
            if any(told_index[key] != index[key] for key in OF_TOKENS):
                raise ConfigError(f"{told} was begun from other tokens: run `python -m train.tell` again")
            self._documents["train"] |= documents["train"]
            self.told_by = told_index["told_by"]
        self.taught_by: dict[str, str] = {}  # the same
        trained = self._documents["train"]
        if taught:
            self.taught_by = read_index(taught)["taught_by"]
            trained |= {name: self.to_train_on(name).taught(taught) for name in taught_collections}
        collections = {name: Rows(documents, context, (seed, i)) for i, (name, documents) in enumerate(trained.items())}
        by_row: list[tuple[int, dict[str, float]]] = []
        parts: dict[str, str] = {}
        for phase in phases:
            shares = dict(phase.weights)
            for name in sorted(set(phase.lengths) & set(trained)):
                least, most = phase.lengths[name].least, phase.lengths[name].most
                part = f"{name} of {least} to {most} tokens"
                place = (seed, list(trained).index(name), least, most)
                collections[part] = Rows(trained[name].of(phase.lengths[name]), context, place)
                parts[part], shares[part] = name, shares.pop(name, 0.0)
            by_row.append((phase.from_tokens // context, shares))
        if short := [name for name, rows in collections.items() if rows.epoch_tokens <= context]:
            where = "run.phases, lengths: " if short[0] in parts else ""
            raise ConfigError(
                f"{where}collection {short[0]!r} has fewer tokens than one row of {context + 1}: too little text"
            )
        trained_on = {name for shares in (weights, *(p.weights for p in phases)) for name in shares if shares[name]}
        if missing := sorted(trained_on - set(collections)):
            raise ConfigError(
                f"collection {missing[0]!r} is to be trained on, but {directory} has no tokens of it to train on: "
                f"run `python -m train.prepare` and what follows it again"
            )
        self.mixture = Mixture(collections, weights, context, seed, by_row, parts)

    def to_train_on(self, collection: str) -> Documents:
        """Raises ConfigError where there are none."""
        if collection not in self._documents["train"]:
            raise ConfigError(f"teach.collections: there are no tokens of {collection!r} to train on")
        return self._documents["train"][collection]

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

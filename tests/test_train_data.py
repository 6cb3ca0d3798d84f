"""Shards and rows: no document is cut or lost, and the step number alone decides what training sees."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import write_tokens

from train.config import ConfigError
from train.data.documents import Documents
from train.data.mixture import BLOCK
from train.data.rows import Rows
from train.data.tokens import TokenData
from train.encode import _ShardWriter

BOUNDARY = 1


def flat(lists: list[list]) -> list:
    return [item for items in lists for item in items]


def test_a_document_longer_than_a_shard_is_kept_whole(tmp_path: Path):
    writer = _ShardWriter(tmp_path, "a.train", 10, BOUNDARY)
    documents = [[BOUNDARY, *[7] * n] for n in (3, 25, 3, 5)]
    writer.add(np.array(flat(documents)))
    writer.flush()
    assert writer.shards == [f"a.train-{n:05d}.npy" for n in range(3)]
    assert [np.load(tmp_path / name).tolist() for name in writer.shards] == [
        documents[0],
        documents[1],
        documents[2] + documents[3],
    ]


def documents_on_disk(directory: Path, shards: list[list[list[int]]]) -> Documents:
    paths = []
    for number, shard in enumerate(shards):
        paths.append(directory / f"{number}.npy")
        np.save(paths[-1], np.array(flat(shard), np.uint16))
    return Documents(paths, BOUNDARY)


DOCUMENT = st.lists(st.integers(2, 500), max_size=9).map(lambda tokens: [BOUNDARY, *tokens])
SHARDS = st.lists(st.lists(DOCUMENT, min_size=1, max_size=4), min_size=1, max_size=3)


def laid_out(documents: list[list[int]], context: int) -> list[int]:
    """Where the rows of documents end to end begin, token by token: the slow and obvious way."""
    begins = {sum(map(len, documents[:i])) for i in range(len(documents))}
    total = sum(map(len, documents))
    starts = [0]
    while starts[-1] + context < total:
        start = starts[-1] + context
        while start not in begins and start > starts[-1]:
            start -= 1
        starts.append(start if start > starts[-1] else starts[-1] + context)
    return starts


@settings(max_examples=150, deadline=None)
@given(SHARDS, st.integers(1, 12), st.integers(0, 5))
def test_rows_are_the_shuffled_documents_laid_out_anew_each_epoch(shards: list, context: int, seed: int):
    documents = flat(shards)
    orders = [np.random.default_rng((seed, 4, epoch)).permutation(len(documents)) for epoch in range(60)]
    with tempfile.TemporaryDirectory() as directory:
        rows = Rows(documents_on_disk(Path(directory), shards), context, (seed, 4))
        assert rows.epoch_tokens == sum(map(len, documents))
        number = 0
        for epoch in range(3):
            shuffled = [documents[i] for i in orders[epoch]]
            after = flat([documents[i] for order in orders[epoch + 1 : epoch + 15] for i in order])
            starts = laid_out(shuffled, context)
            for place, start in enumerate(starts):
                assert rows.row(number).tolist() == (flat(shuffled) + after)[start : start + context + 1]
                assert rows.epochs(number) == epoch + place / len(starts)
                number += 1


@settings(max_examples=150, deadline=None)
@given(SHARDS, st.integers(4, 12), st.integers(0, 5))
def test_no_document_that_fits_is_ever_cut_and_every_token_is_learnt(shards: list, context: int, seed: int):
    """In one epoch: each document of up to a context stands whole in a row, each token but the first is a target."""
    documents = [[BOUNDARY, *(100 * n + i for i in range(1, len(d)))] for n, d in enumerate(flat(shards), 1)]
    with tempfile.TemporaryDirectory() as directory:
        rows = Rows(documents_on_disk(Path(directory), [documents]), context, (seed, 0))
        of_epoch = []
        while rows.epochs(len(of_epoch)) < 1:
            of_epoch.append(rows.row(len(of_epoch)).tolist())
    for document in documents:
        if len(document) <= context:
            assert any(row[i : i + len(document)] == document for row in of_epoch for i in range(context))
    targets = {token for row in of_epoch for token in row[1:]}
    assert targets >= {token for document in documents for token in document[1:]}
    assert of_epoch[0][0] == BOUNDARY
    for before, row in pairwise(of_epoch):
        assert row[0] in (BOUNDARY, before[-1])  # a document's beginning, or where the row before ended


def test_every_epoch_has_an_order_of_its_own(tmp_path: Path):
    shards = [[[BOUNDARY, n] for n in range(first, first + 50)] for first in (10, 60)]
    rows = Rows(documents_on_disk(tmp_path, shards), 20, (1, 0))
    epochs = [np.concatenate([rows.row(epoch * 10 + i)[:-1] for i in range(10)])[1::2] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


CONTEXT = 8
MARKS = {"much": 10, "some": 20, "little": 30}  # the token that each collection's documents are made of
WEIGHTS = {"much": 0.8, "some": 0.15, "little": 0.05}  # sum to 1 with shares that are whole rows of a block


@pytest.fixture
def tokens_dir(tmp_path: Path) -> Path:
    collections = {
        name: {"train": [[BOUNDARY, *[mark + i % 7] * (3 + i % 4)] for i in range(60)]} for name, mark in MARKS.items()
    }
    held_out = [[BOUNDARY, *range(2, 2 + n)] for n in (1, 7, 8, 9, 16, 17, 30)]
    collections["much"]["validation"] = held_out
    collections["never"] = {"validation": [[BOUNDARY, 5, 6]]}
    write_tokens(tmp_path / "tokens", collections)
    return tmp_path / "tokens"


def data_in(directory: Path, seed: int = 1) -> TokenData:
    return TokenData.load(directory, CONTEXT, seed, {**WEIGHTS, "never": 0})


def collection_of(row: np.ndarray) -> str:
    marks = {int(token) // 10 * 10 for token in row if token != BOUNDARY}
    assert len(marks) == 1  # a row is of one collection
    return {mark: name for name, mark in MARKS.items()}[marks.pop()]


def test_the_weights_hold_exactly_over_every_block(tokens_dir: Path):
    mixture = data_in(tokens_dir).mixture
    for block in (0, 1, 5):
        rows = mixture.rows(block * BLOCK, BLOCK)
        assert rows.shape == (BLOCK, CONTEXT + 1)
        counts = Counter(map(collection_of, rows))
        assert counts == {name: round(weight * BLOCK) for name, weight in WEIGHTS.items()}


def own_rows(tokens_dir: Path, name: str, count: int) -> list[list[int]]:
    """A collection's first rows, of whatever mixture."""
    documents = Documents([tokens_dir / f"{name}.train-00000.npy"], BOUNDARY)
    rows = Rows(documents, CONTEXT, (1, list(MARKS).index(name)))
    return [rows.row(number).tolist() for number in range(count)]


def test_a_mixture_has_its_collections_rows_in_their_order(tokens_dir: Path):
    """None is left out, over the end of a block as well."""
    mixture = data_in(tokens_dir).mixture
    rows = mixture.rows(0, BLOCK + 300)
    assert mixture.collections(0, len(rows)) == [collection_of(row) for row in rows]
    for name in MARKS:
        own = [row.tolist() for row in rows if collection_of(row) == name]
        assert own == own_rows(tokens_dir, name, len(own))
        assert mixture.tokens(len(rows))[name] == len(own) * CONTEXT


@settings(max_examples=10, deadline=None)
@given(numbers=st.lists(st.integers(0, 2500), min_size=1, max_size=10))
def test_a_row_is_the_same_whatever_was_read_before(numbers: list[int]):
    with tempfile.TemporaryDirectory() as directory:
        collections = {name: {"train": [[BOUNDARY, mark, i + 100] for i in range(40)]} for name, mark in MARKS.items()}
        write_tokens(Path(directory) / "tokens", collections)
        used = data_in(Path(directory) / "tokens").mixture
        for number in numbers:
            fresh = data_in(Path(directory) / "tokens").mixture
            assert (used.rows(number, 1) == fresh.rows(number, 1)).all()
        assert (used.rows(numbers[0], 3)[2] == used.rows(numbers[0] + 2, 1)[0]).all()


def test_the_seed_decides_the_order(tokens_dir: Path):
    one, two = (data_in(tokens_dir, seed).mixture.rows(0, 50) for seed in (1, 2))
    assert (one != two).any()


def test_epochs_count_what_was_gone_through(tokens_dir: Path):
    data = data_in(tokens_dir)
    epochs = data.mixture.epochs(2 * BLOCK)
    for name, weight in WEIGHTS.items():
        documents = Documents([tokens_dir / f"{name}.train-00000.npy"], BOUNDARY)
        rows = Rows(documents, CONTEXT, (1, list(MARKS).index(name)))
        assert epochs[name] == rows.epochs(round(weight * 2 * BLOCK))


def test_validation_windows_cover_the_documents(tokens_dir: Path):
    data = data_in(tokens_dir)
    assert list(data.held_out) == ["much", "never"]
    rows = data.validation_rows("much", 1000)
    # Every token but the boundary is a target once, in order; every window's first input is the token before.
    targets = [token for row in rows for token in row[1:] if token >= 0]
    assert targets == [token for n in (1, 7, 8, 9, 16, 17, 30) for token in range(2, 2 + n)]
    for row in rows:
        padding = np.flatnonzero(row < 0)
        assert row[0] >= 0
        assert padding.tolist() == list(range(CONTEXT + 1 - len(padding), CONTEXT + 1))
    assert (data.validation_rows("much", 3) == rows[:3]).all()
    assert data.validation_rows("never", 4).tolist() == [[BOUNDARY, 5, 6] + [-1] * (CONTEXT - 2)]


def test_damaged_files_are_named(tokens_dir: Path, tmp_path: Path):
    for name in ("index.json", "much.train-00000.npy"):
        directory = Path(shutil.copytree(tokens_dir, tmp_path / name))
        whole = (directory / name).read_bytes()
        for content in (whole[: len(whole) // 2], b""):
            (directory / name).write_bytes(content)
            with pytest.raises(ConfigError, match=f"{directory} is damaged, make it again"):
                data_in(directory)


def test_too_little_text_is_named(tmp_path: Path):
    write_tokens(tmp_path / "t", {"little": {"train": [[BOUNDARY, 2, 3]], "validation": [[BOUNDARY, 2]]}})
    with pytest.raises(ConfigError, match="'little' has fewer tokens than one row of 9"):
        TokenData.load(tmp_path / "t", CONTEXT, 1, {"little": 1})


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"much": 1, "never": 0.1}, "'never' is to be trained on, but .* has no tokens of it to train on"),
        ({"much": 1, "other": 0.1}, "'other' is to be trained on"),
        ({"much": 1, "some": 4e-4}, "'some' has a weight of 0.0004 of 1.0004: too little for a row in 1000"),
    ],
)
def test_weights_that_can_not_hold_are_named(tokens_dir: Path, weights: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        TokenData.load(tokens_dir, CONTEXT, 1, weights)

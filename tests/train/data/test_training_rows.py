"""Training rows: no document is cut or lost, and the row's number alone decides what it holds."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.train import write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import ConfigError
from train.data.documents import Documents
from train.data.mixture import BLOCK
from train.data.rows import Rows
from train.data.tokens import TokenData
from train.encode import _ShardWriter

BOUNDARY = 1


def flat(lists: list[list]) -> list:
    return [item for items in lists for item in items]


def test_no_document_is_split_between_two_shards(tmp_path: Path):
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
    """Return where rows start among the tokens of the documents, found token by token."""
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
def test_rows_equal_a_slow_layout_of_the_shuffled_documents(shards: list, context: int, seed: int):
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
def test_documents_that_fit_are_whole_and_all_tokens_targets(shards: list, context: int, seed: int):
    """One epoch: each document of up to a context is whole in a row, and each token but the first is a target."""
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
        assert row[0] in (BOUNDARY, before[-1])  # a document's beginning, or the end of the row before


def test_every_epoch_has_another_order(tmp_path: Path):
    shards = [[[BOUNDARY, n] for n in range(first, first + 50)] for first in (10, 60)]
    rows = Rows(documents_on_disk(tmp_path, shards), 20, (1, 0))
    epochs = [np.concatenate([rows.row(epoch * 10 + i)[:-1] for i in range(10)])[1::2] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


CONTEXT = 8


MARKS = {"much": 10, "some": 20, "little": 30}  # the tokens of each collection


WEIGHTS = {"much": 0.8, "some": 0.15, "little": 0.05}  # each is a whole number of rows of a block


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


def test_each_block_has_exactly_the_weights(tokens_dir: Path):
    mixture = data_in(tokens_dir).mixture
    for block in (0, 1, 5):
        rows = mixture.rows(block * BLOCK, BLOCK)
        assert rows.shape == (BLOCK, CONTEXT + 1)
        counts = Counter(map(collection_of, rows))
        assert counts == {name: round(weight * BLOCK) for name, weight in WEIGHTS.items()}


def own_rows(tokens_dir: Path, name: str, count: int) -> list[list[int]]:
    """Return a collection's first rows outside of any mixture."""
    documents = Documents([tokens_dir / f"{name}.train-00000.npy"], BOUNDARY)
    rows = Rows(documents, CONTEXT, (1, list(MARKS).index(name)))
    return [rows.row(number).tolist() for number in range(count)]


def test_a_mixture_keeps_each_collections_order(tokens_dir: Path):
    """No row is left out, also where one block ends and the next begins."""
    mixture = data_in(tokens_dir).mixture
    rows = mixture.rows(0, BLOCK + 300)
    assert mixture.collections(0, len(rows)) == [collection_of(row) for row in rows]
    for name in MARKS:
        own = [row.tolist() for row in rows if collection_of(row) == name]
        assert own == own_rows(tokens_dir, name, len(own))
        assert mixture.tokens(len(rows))[name] == len(own) * CONTEXT


@settings(max_examples=10, deadline=None)
@given(numbers=st.lists(st.integers(0, 2500), min_size=1, max_size=10))
def test_earlier_reads_do_not_change_a_row(numbers: list[int]):
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


def test_epochs_count_the_rows_of_each_collection(tokens_dir: Path):
    data = data_in(tokens_dir)
    epochs = data.mixture.epochs(2 * BLOCK)
    for name, weight in WEIGHTS.items():
        documents = Documents([tokens_dir / f"{name}.train-00000.npy"], BOUNDARY)
        rows = Rows(documents, CONTEXT, (1, list(MARKS).index(name)))
        assert epochs[name] == rows.epochs(round(weight * 2 * BLOCK))


def test_validation_rows_cover_the_documents_once(tokens_dir: Path):
    data = data_in(tokens_dir)
    assert list(data.held_out) == ["much", "never"]
    rows = data.validation_rows("much", 1000)
    # Every token but the boundary is a target once, in order.
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


def test_a_collection_smaller_than_a_row_is_named(tmp_path: Path):
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
def test_weights_without_enough_text_are_named(tokens_dir: Path, weights: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        TokenData.load(tokens_dir, CONTEXT, 1, weights)

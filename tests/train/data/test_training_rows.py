"""Training rows: no document is cut or lost, and a row depends only on its number."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.train import write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import ConfigError
from train.data.mixture import BLOCK
from train.data.rows import Documents, Rows
from train.data.tokens import TokenData
from train.encode import _ShardWriter

BOUNDARY = 1
CONTEXT = 8
MARKS = {"much": 10, "some": 20, "little": 30}  # the tokens of each collection
WEIGHTS = {"much": 0.8, "some": 0.15, "little": 0.05}  # each is a whole number of rows of a block
HELD_OUT = [[BOUNDARY, *range(2, 2 + n)] for n in (1, 7, 8, 9, 16, 17, 30)]

DOCUMENT = st.lists(st.integers(2, 500), max_size=9).map(lambda tokens: [BOUNDARY, *tokens])
SHARDS = st.lists(st.lists(DOCUMENT, min_size=1, max_size=4), min_size=1, max_size=3)


def flat(lists: list[list]) -> list:
    return [item for items in lists for item in items]


def test_no_document_is_split_between_two_shards(tmp_path: Path):
    writer = _ShardWriter(tmp_path, "a.train", 10, BOUNDARY)
    documents = [[BOUNDARY, *[7] * n] for n in (3, 25, 3, 5)]
    writer.add(np.array(flat(documents)))
    writer.flush()
    found = [np.load(tmp_path / name).tolist() for name in writer.shards]
    assert found == [documents[0], documents[1], documents[2] + documents[3]]


def documents_on_disk(directory: Path, shards: list[list[list[int]]]) -> Documents:
    paths = [directory / f"{number}.npy" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        np.save(path, np.array(flat(shard), np.uint16))
    return Documents(paths, BOUNDARY)


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


@settings(max_examples=80)
@given(SHARDS, st.integers(1, 12), st.integers(0, 5))
def test_rows_equal_a_slow_layout_of_the_shuffled_documents(shards: list, context: int, seed: int):
    documents = flat(shards)
    orders = [np.random.default_rng((seed, 4, epoch)).permutation(len(documents)) for epoch in range(20)]
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


@settings(max_examples=80)
@given(SHARDS, st.integers(4, 12), st.integers(0, 5))
def test_short_documents_stay_whole_and_all_tokens_are_targets(shards: list, context: int, seed: int):
    """In one epoch, each document of up to a context is whole in a row, and each token except the first is a target."""
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


@pytest.fixture
def tokens_dir(tmp_path: Path) -> Path:
    collections = {
        name: {"train": [[BOUNDARY, *[mark + i % 7] * (3 + i % 4)] for i in range(60)]} for name, mark in MARKS.items()
    }
    collections["much"]["validation"] = HELD_OUT
    collections["never"] = {"validation": [[BOUNDARY, 5, 6]]}
    write_tokens(tmp_path / "tokens", collections)
    return tmp_path / "tokens"


def data_in(directory: Path, seed: int = 1, **final: Any) -> TokenData:
    return TokenData.load(directory, CONTEXT, seed, {**WEIGHTS, "never": 0}, **final)


def collection_of(row: np.ndarray) -> str:
    (mark,) = {int(token) // 10 * 10 for token in row if token != BOUNDARY}  # a row is of one collection
    return {mark: name for name, mark in MARKS.items()}[mark]


def test_each_block_has_exactly_the_weights(tokens_dir: Path):
    mixture = data_in(tokens_dir).mixture
    for block in (0, 1, 5):
        rows = mixture.rows(block * BLOCK, BLOCK)
        assert rows.shape == (BLOCK, CONTEXT + 1)
        counts = Counter(map(collection_of, rows))
        assert counts == {name: round(weight * BLOCK) for name, weight in WEIGHTS.items()}


def test_a_mixture_keeps_the_order_of_each_collection(tokens_dir: Path):
    """No row is left out, also where one block ends and the next begins."""
    mixture = data_in(tokens_dir).mixture
    rows = mixture.rows(0, BLOCK + 300)
    assert mixture.collections(0, len(rows)) == [collection_of(row) for row in rows]
    for i, name in enumerate(MARKS):
        alone = Rows(Documents([tokens_dir / f"{name}.train-00000.npy"], BOUNDARY), CONTEXT, (1, i))
        own = [row.tolist() for row in rows if collection_of(row) == name]
        assert own == [alone.row(number).tolist() for number in range(len(own))]
        assert mixture.tokens(len(rows))[name] == len(own) * CONTEXT
        assert mixture.epochs(len(rows))[name] == alone.epochs(len(own))


def test_final_rows_have_only_short_documents(tokens_dir: Path):
    """Rows before them, and other collections, are the same as without final rows."""
    plain = data_in(tokens_dir).mixture
    final_row, n_rows, longest = BLOCK // 2 + 7, 2 * BLOCK, 4
    final = data_in(tokens_dir, final_row=final_row, final_max_tokens={"much": longest}).mixture
    short = Rows(Documents([tokens_dir / "much.train-00000.npy"], BOUNDARY).of_at_most(longest), CONTEXT, (1, 0, 1))
    names, before = plain.collections(0, n_rows), plain.collections(0, final_row).count("much")
    in_final = [number for number in range(final_row, n_rows) if names[number] == "much"]
    for i, number in enumerate(in_final):
        row = final.rows(number, 1)[0]
        assert (row == short.row(i)).all()
        assert max(map(len, "".join("|" if token == BOUNDARY else "x" for token in row).split("|"))) < longest
    others = sorted(set(range(n_rows)) - set(in_final))
    assert all((plain.rows(number, 1) == final.rows(number, 1)).all() for number in others)
    share = short.epoch_tokens / Rows(Documents([tokens_dir / "much.train-00000.npy"], BOUNDARY), 8, (1,)).epoch_tokens
    expected = plain.epochs(final_row)["much"] + short.epochs(len(in_final)) * share
    assert final.epochs(n_rows)["much"] == pytest.approx(expected)
    assert final.epochs(before) == plain.epochs(before)
    assert final.tokens(n_rows) == plain.tokens(n_rows)


def test_final_rows_without_a_row_of_documents_are_refused(tokens_dir: Path):
    with pytest.raises(ConfigError, match=r"run\.final_max_tokens\.some is 2: the documents of at most so many tokens"):
        data_in(tokens_dir, final_max_tokens={"some": 2})


@settings(max_examples=10)
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


def test_validation_rows_contain_every_document_once(tokens_dir: Path):
    data = data_in(tokens_dir)
    rows = data.validation_rows("much", 1000)
    targets = [token for row in rows for token in row[1:] if token >= 0]
    assert targets == [token for document in HELD_OUT for token in document[1:]]
    for row in rows:
        padding = np.flatnonzero(row < 0)
        assert row[0] >= 0
        assert padding.tolist() == list(range(CONTEXT + 1 - len(padding), CONTEXT + 1))
    assert (data.validation_rows("much", 3) == rows[:3]).all()
    assert data.validation_rows("never", 4).tolist() == [[BOUNDARY, 5, 6] + [-1] * (CONTEXT - 2)]


@pytest.mark.parametrize("name", ["index.json", "much.train-00000.npy"])
def test_damaged_files_are_named(tokens_dir: Path, name: str):
    content = (tokens_dir / name).read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        (tokens_dir / name).write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{tokens_dir} is damaged, make it again"):
            data_in(tokens_dir)


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


def test_a_collection_smaller_than_a_row_is_named(tmp_path: Path):
    write_tokens(tmp_path / "t", {"little": {"train": [[BOUNDARY, 2, 3]], "validation": [[BOUNDARY, 2]]}})
    with pytest.raises(ConfigError, match="'little' has fewer tokens than one row of 9"):
        TokenData.load(tmp_path / "t", CONTEXT, 1, {"little": 1})

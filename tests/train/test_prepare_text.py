"""Preparing text: every format, the same result every time, nothing held out that is also trained on, clear errors."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import tempfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.train import make_config, python, texts_of, tree_bytes, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from train.config import ConfigError, TrainConfig
from train.demo_text import demo_text
from train.files import matching_files
from train.prepare import SPLITS, clean, is_validation, prepare

STORIES = [
    f"Story number {n}: a mouse found {n} nuts under a tree and carried every one of them home." for n in range(80)
]


def rows_of(config: TrainConfig, collection: str = "a") -> list[dict]:
    """Rows of both splits, each with its split's name."""
    return [
        {**row, "split": split}
        for split in SPLITS
        for row in pq.read_table(config.text_dir / f"{collection}.{split}.parquet").to_pylist()
    ]


def prepared(workdir: Path, source: Path | str, **collection: object) -> list[dict]:
    config = make_config(
        workdir, [{"name": "a", "source": str(source), **collection}], prepare={"validation_share": 0.2}
    )
    prepare(config)
    return rows_of(config)


def test_parquet_keeps_source_author_and_licence(tmp_path: Path):
    columns = {
        "text": STORIES,
        "source": [f"book {n // 4}" for n in range(80)],
        "author": [f"Author {n // 8}" for n in range(80)],
        "licence": ["CC-BY-4.0"] * 40 + [""] * 40,
        "other": list(range(80)),
    }
    rows = prepared(tmp_path / "w", write_parquet(tmp_path / "t.parquet", columns), licence="of the collection")
    by_text = {row["text"]: row for row in rows}
    assert set(by_text) == set(STORIES)
    for n, text in enumerate(STORIES):
        row = by_text[text]
        assert (row["source"], row["author"]) == (columns["source"][n], columns["author"][n])
        assert row["licence"] == ("CC-BY-4.0" if n < 40 else "of the collection")
        assert row["collection"] == "a"
    manifest = json.loads((tmp_path / "w/text/manifest.json").read_text())["a"]
    trained = [row for row in rows if row["split"] == "train"]
    assert manifest["train"]["documents"] == len(trained)
    assert manifest["train"]["bytes"] == sum(len(row["text"].encode()) for row in trained)
    assert manifest["train"]["author_names"] == sorted({row["author"] for row in trained})
    assert manifest["train"]["licences"] == ["CC-BY-4.0", "of the collection"]


def test_parquet_with_text_alone_splits_by_document(tmp_path: Path):
    rows = prepared(tmp_path / "w", write_parquet(tmp_path / "t.parquet", {"text": STORIES}), licence="L")
    assert sorted(row["text"] for row in rows) == sorted(STORIES)
    assert len({row["source"] for row in rows}) == len(STORIES)
    assert {row["licence"] for row in rows} == {"L"}


def test_columns_of_other_names_and_kinds(tmp_path: Path):
    """Book numbers are sources too, number 0 as well: it must not be taken for 'no source' and split by document."""
    books = [n // 2 for n in range(80)]
    path = write_parquet(tmp_path / "t.parquet", {"story": STORIES, "book": books})
    rows = prepared(tmp_path / "w", path, text_column="story", source_column="book")
    assert {row["text"]: row["source"] for row in rows} == {s: str(b) for s, b in zip(STORIES, books, strict=True)}


COMPRESSORS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_plain_text_in_every_compression(tmp_path: Path, ending: str):
    path = tmp_path / f"stories.txt{ending}"
    path.write_bytes(COMPRESSORS[ending]("\n<|endoftext|>\n".join(STORIES).encode()))
    assert sorted(row["text"] for row in prepared(tmp_path / "w", path)) == sorted(STORIES)


@given(name=st.text("[]*?!ab-", min_size=1, max_size=8), pattern=st.sampled_from(["*.txt", "**/*.txt"]))
def test_an_existing_path_is_no_pattern(name: str, pattern: str):
    """Brackets, stars and question marks may be in the names of files and of the directories before a pattern."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, name)
        directory.mkdir()
        file = directory / f"{name}.txt"
        file.write_text("x")
        assert matching_files(str(file)) == [file]
        assert matching_files(str(directory / pattern)) == [file]


def test_a_glob_of_text_files_is_one_document_each(tmp_path: Path):
    for n, story in enumerate(STORIES):
        (tmp_path / f"{n}.txt").write_text(story, encoding="utf-8")
    rows = prepared(tmp_path / "w", tmp_path / "*.txt")
    assert {row["source"]: row["text"] for row in rows} == {f"{n}.txt": story for n, story in enumerate(STORIES)}


def test_the_demo_text_is_reproducible_and_read_completely(tmp_path: Path):
    text = demo_text(60, seed=1)
    assert text == demo_text(60, seed=1)
    assert text != demo_text(60, seed=2)
    path = tmp_path / "stories.txt"
    path.write_text(text, encoding="utf-8")
    rows = prepared(tmp_path / "w", path)
    assert len(rows) == 60
    assert all(row["text"].startswith("Once upon a time there was a ") for row in rows)
    assert not any("<|endoftext|>" in row["text"] or "{" in row["text"] for row in rows)


def test_two_runs_give_the_same_bytes(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": STORIES, "author": [f"A{n % 30}" for n in range(80)]})
    prepared(tmp_path / "one", path)
    prepared(tmp_path / "two", path)
    assert tree_bytes(tmp_path / "one/text") == tree_bytes(tmp_path / "two/text")
    prepared(tmp_path / "two", path)  # over what is there
    assert tree_bytes(tmp_path / "one/text") == tree_bytes(tmp_path / "two/text")


def test_every_source_stays_on_one_side(tmp_path: Path):
    sources = [f"book {n // 2}" for n in range(80)]
    few = prepared(
        tmp_path / "few", write_parquet(tmp_path / "few.parquet", {"text": STORIES[:40], "source": sources[:40]})
    )
    # More books, in front of the old ones, and more of the old ones' text.
    more = STORIES[40:] + STORIES[:40] + [story.replace("mouse", "squirrel") for story in STORIES]
    columns = {"text": more, "source": sources[40:] + sources[:40] + sources}
    many = prepared(tmp_path / "many", write_parquet(tmp_path / "many.parquet", columns))
    assert len(few) == 40
    assert len(many) == 160
    sides: dict[str, set[str]] = {}
    for row in few + many:
        sides.setdefault(row["source"], set()).add(row["split"])
    assert len(sides) == 40
    assert all(len(splits) == 1 for splits in sides.values())
    assert set.union(*sides.values()) == set(SPLITS)


def test_a_collection_without_weight_is_held_out_whole(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": STORIES})
    collections = [{"name": "a", "source": str(path)}, {"name": "held", "source": str(path), "weight": 0}]
    config = make_config(tmp_path, collections, prepare={"validation_share": 0.2})
    manifest = prepare(config)
    assert {row["split"] for row in rows_of(config, "held")} == {"validation"}
    assert manifest["held"]["validation"]["documents"] == 80
    assert manifest["held"]["train"]["documents"] == 0


def test_the_manifest_tells_one_text_from_another(tmp_path: Path):
    """Same counts, another letter: tokens of the one are not those of the other."""
    path = tmp_path / "t.parquet"
    sums = []
    for stories in (STORIES, STORIES, [STORIES[0].replace("mouse", "louse"), *STORIES[1:]]):
        prepared(tmp_path, write_parquet(path, {"text": stories, "source": [f"book {n // 2}" for n in range(80)]}))
        sums.append((tmp_path / "text/manifest.json").read_bytes())
    assert sums[0] == sums[1] != sums[2]


def test_the_seed_selects_which_sources_are_held_out():
    held = {seed: {n for n in range(5000) if is_validation(f"book {n}", 0.1, seed)} for seed in (1, 2)}
    assert 400 < len(held[1]) < 600  # 500 ± 21
    assert len(held[1] & held[2]) < 100  # 50 by chance
    assert held[1] <= {n for n in range(5000) if is_validation(f"book {n}", 0.2, 1)}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Hi \r\n\n\n\n\nthere\x00", "Hi\n\nthere"),
        ("one\rtwo", "one\ntwo"),
        ("a\tb", "a\tb"),
        ("cafe\u0301", "café"),
        ("cafe\x00\u0301", "café"),
        ("one\r\x00\ntwo", "one\ntwo"),
        ("line \t\xa0\nnext", "line\nnext"),
        ("\n\n  text  \n\n", "text"),
        ("a\n \n \n \nb", "a\n\nb"),
        ("bell\x07\x1b[0m\x7f", "bell[0m"),
        ("", ""),
        ("naïve — “quoted” 😀", "naïve — “quoted” 😀"),
    ],
)
def test_cleaning(raw: str, cleaned: str):
    assert clean(raw) == cleaned


@given(st.text(alphabet=st.sampled_from("ab \t\n\r\x00\xa0\u0301é😀")))
def test_cleaning_is_done_once_and_loses_no_letter(text: str):
    def letters(text: str) -> list[str]:
        return [c for c in unicodedata.normalize("NFD", text) if c.isprintable() and not c.isspace()]

    once = clean(text)
    assert clean(once) == once
    assert letters(once) == letters(text)


def test_duplicates_and_short_documents_are_dropped(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": [*STORIES, *STORIES[:20], "too short", "", None, "x" * 63]})
    rows = prepared(tmp_path / "w", path)
    assert sorted(row["text"] for row in rows) == sorted(STORIES)


def test_a_duplicate_is_known_after_cleaning(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": [*STORIES, *(story + " \r\n" for story in STORIES)]})
    assert len(prepared(tmp_path / "w", path)) == len(STORIES)


def test_minimum_filters_rows(tmp_path: Path):
    path = write_parquet(
        tmp_path / "t.parquet", {"text": STORIES, "ease": [n / 80 for n in range(78)] + [None, math.nan]}
    )
    rows = prepared(tmp_path / "w", path, minimum={"ease": 0.5})
    assert sorted(row["text"] for row in rows) == sorted(STORIES[40:78])


def test_max_documents_takes_the_first(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": STORIES})
    config = make_config(
        tmp_path / "w", [{"name": "a", "source": str(path)}], prepare={"max_documents": 30, "validation_share": 0.2}
    )
    prepare(config)
    assert sorted(texts_of(config, "a", "train") + texts_of(config, "a", "validation")) == sorted(STORIES[:30])


def _broken_sources(directory: Path) -> dict[str, tuple[dict, str]]:
    """Case -> (the collection's settings, what the error must name)."""
    (directory / "empty.parquet").write_bytes(b"")
    (directory / "text.parquet").write_text("no Parquet at all", encoding="utf-8")
    (directory / "latin.txt").write_bytes("Ein Bär ging über die Brücke. ".encode("latin-1") * 10)
    (directory / "empty.txt").write_bytes(b"")
    (directory / "cut.txt.gz").write_bytes(gzip.compress(b"word " * 1000)[:-20])
    (directory / "cut.txt.xz").write_bytes(lzma.compress(b"word " * 1000)[:-20])
    (directory / "folder.txt").mkdir()
    (directory / "folder.parquet").mkdir()
    write_parquet(directory / "body.parquet", {"body": STORIES})
    write_parquet(directory / "numbers.parquet", {"text": list(range(80))})
    write_parquet(directory / "words.parquet", {"text": STORIES, "ease": ["high"] * 80})
    write_parquet(directory / "one.parquet", {"text": STORIES, "source": ["one book"] * 80})
    (directory / "good.txt").write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    cases = {
        "nothing.parquet": ({}, "no file matches"),
        "nothing-*.txt": ({}, "no file matches"),
        "empty.parquet": ({}, "not a Parquet file"),
        "text.parquet": ({}, "not a Parquet file"),
        "latin.txt": ({}, "UTF-8"),
        "empty.txt": ({}, "no documents for train"),
        "cut.txt.gz": ({}, "cannot read"),
        "cut.txt.xz": ({}, "cannot read"),
        "folder.txt": ({}, "cannot read"),
        "folder.parquet": ({}, "not a Parquet file"),
        "body.parquet": ({}, "no column 'text'"),
        "numbers.parquet": ({}, "not text"),
        "words.parquet": ({"minimum": {"ease": 0.5}}, "no number"),
        "one.parquet": ({}, "no documents for"),
        "good.txt": ({"minimum": {"ease": 0.5}}, "no column 'ease'"),
    }
    return {name: ({"source": str(directory / name), **settings}, named) for name, (settings, named) in cases.items()}


def test_unusable_sources_are_named_and_earlier_text_stays(tmp_path: Path):
    workdir = tmp_path / "w"
    prepared(workdir, write_parquet(tmp_path / "t.parquet", {"text": STORIES}))
    earlier = tree_bytes(workdir / "text")
    for name, (settings, named) in _broken_sources(tmp_path).items():
        config = make_config(
            workdir, [{"name": "good", "source": str(tmp_path / "t.parquet")}, {"name": "b", **settings}]
        )
        with pytest.raises(ConfigError) as raised:
            prepare(config)
        message = str(raised.value)
        assert named in message, name
        assert "collection 'b'" in message
        assert name in message or "column" in named or "not text" in named or "number" in named, message
        assert "\n" not in message, name
        assert tree_bytes(workdir / "text") == earlier, name


def test_a_dataset_that_cannot_be_loaded_is_one_line(tmp_path: Path):
    result = python(
        ["-m", "train.prepare", "--config", "configs/train.yaml", f"workdir={tmp_path}"], tmp_path, timeout_s=120
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: collection 'tinystories': 'roneneldan/TinyStories'")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("through", ["text", "link", "linked file"])
def test_a_source_inside_the_output_is_refused_and_kept(tmp_path: Path, through: str):
    """All sources were deleted: `data/text` is a natural place for texts, and the default of workdir is `data`."""
    text = tmp_path / "text"
    text.mkdir()
    for n, story in enumerate(STORIES):
        (text / f"{n}.txt").write_text(story, encoding="utf-8")
    (tmp_path / "link").symlink_to("text")
    (tmp_path / "linked file").mkdir()
    (tmp_path / "linked file" / "0.txt").symlink_to(text / "0.txt")
    before = tree_bytes(tmp_path)
    with pytest.raises(ConfigError, match=rf"'a': {tmp_path / through}/0.txt lies in {text}, which this command"):
        prepared(tmp_path, tmp_path / through / "*.txt")
    assert tree_bytes(tmp_path) == before


def test_a_work_directory_of_an_older_release_is_usable(tmp_path: Path):
    """Its manifest has the form of today's, and lists which files may be replaced."""
    text = tmp_path / "text"
    text.mkdir()
    splits = {split: {"documents": 1, "bytes": 1, "sources": 1, "sha256": "0"} for split in SPLITS}
    (text / "manifest.json").write_text(json.dumps({"old": {"source": "x", **splits}}))
    for name in ("text/old.train.parquet", "text/old.validation.parquet", "text.old", "text.partial"):
        (tmp_path / name).write_text("of the older release")
    prepared(tmp_path, write_parquet(tmp_path / "t.parquet", {"text": STORIES}))
    assert {path.name for path in text.iterdir()} == {"manifest.json", "a.train.parquet", "a.validation.parquet"}
    assert (tmp_path / "text.old").exists()
    assert (tmp_path / "text.partial").exists()

"""Preparing text: every format, the same result every time, no held-out text in training, and clear errors."""

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
from helpers.train import make_config, python, tree_bytes, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from train.config import ConfigError, TrainConfig
from train.data.sources import matching_files
from train.demo_text import demo_text
from train.prepare import SPLITS, clean, is_validation, opening_cutter, prepare
from train.tokenizer import _training_lines

STORIES = [
    f"Story number {n}: a mouse found {n} nuts under a tree and carried every one of them home." for n in range(80)
]


def rows_of(config: TrainConfig, collection: str = "a") -> list[dict]:
    """Return the rows of both splits, each with its split's name."""
    return [
        {**row, "split": split}
        for split in SPLITS
        for row in pq.read_table(config.text_file(collection, split)).to_pylist()
    ]


def prepared(workdir: Path, source: Path | str, max_documents: int | None = None, **collection: object) -> list[dict]:
    section = {"validation_share": 0.2, "max_documents": max_documents}
    config = make_config(workdir, [{"name": "a", "source": str(source), **collection}], prepare=section)
    prepare(config)
    return rows_of(config)


def texts(rows: list[dict]) -> list[str]:
    return sorted(row["text"] for row in rows)


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
        assert (row["collection"], row["source"], row["author"]) == ("a", columns["source"][n], columns["author"][n])
        assert row["licence"] == ("CC-BY-4.0" if n < 40 else "of the collection")
    manifest = json.loads((tmp_path / "w/text/manifest.json").read_text())["a"]
    trained = [row for row in rows if row["split"] == "train"]
    assert manifest["train"]["documents"] == len(trained)
    assert manifest["train"]["bytes"] == sum(len(row["text"].encode()) for row in trained)
    assert manifest["train"]["author_names"] == sorted({row["author"] for row in trained})
    assert manifest["train"]["licences"] == ["CC-BY-4.0", "of the collection"]


def test_columns_may_have_other_names_and_types(tmp_path: Path):
    """Number 0 is a source too. If it counted as missing, its documents could go to both splits."""
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
def test_plain_text_is_read_in_every_compression(tmp_path: Path, ending: str):
    path = tmp_path / f"stories.txt{ending}"
    path.write_bytes(COMPRESSORS[ending]("\n<|endoftext|>\n".join(STORIES).encode()))
    assert texts(prepared(tmp_path / "w", path)) == sorted(STORIES)


@given(name=st.text("[]*?!ab-", min_size=1, max_size=8), pattern=st.sampled_from(["*.txt", "**/*.txt"]))
def test_an_existing_path_is_not_a_pattern(name: str, pattern: str):
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, name)
        directory.mkdir()
        file = directory / f"{name}.txt"
        file.write_text("x")
        assert matching_files(str(file)) == [file]
        assert matching_files(str(directory / pattern)) == [file]


def test_a_pattern_reads_each_file_as_a_document(tmp_path: Path):
    for n, story in enumerate(STORIES):
        (tmp_path / f"{n}.txt").write_text(story, encoding="utf-8")
    rows = prepared(tmp_path / "w", tmp_path / "*.txt")
    assert {row["source"]: row["text"] for row in rows} == {f"{n}.txt": story for n, story in enumerate(STORIES)}


def test_a_seed_gives_the_same_demo_text(tmp_path: Path):
    text = demo_text(60, seed=1)
    assert text == demo_text(60, seed=1) != demo_text(60, seed=2)
    path = tmp_path / "stories.txt"
    path.write_text(text, encoding="utf-8")
    rows = prepared(tmp_path / "w", path)
    assert len(rows) == 60
    assert all(row["text"].startswith("Once upon a time there was a ") for row in rows)
    assert not any("<|endoftext|>" in row["text"] or "{" in row["text"] for row in rows)


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path):
    """The sums in the manifest change with every letter, because they show whether tokens belong to this text."""
    columns = {"text": STORIES, "author": [f"A{n % 30}" for n in range(80)], "source": [f"{n // 2}" for n in range(80)]}
    path = write_parquet(tmp_path / "t.parquet", columns)
    prepared(tmp_path, path)
    first = tree_bytes(tmp_path / "text")
    prepared(tmp_path, path)
    assert tree_bytes(tmp_path / "text") == first
    changed = [STORIES[0].replace("mouse", "louse"), *STORIES[1:]]
    prepared(tmp_path, write_parquet(path, {**columns, "text": changed}))
    assert tree_bytes(tmp_path / "text")["manifest.json"] != first["manifest.json"]


def test_every_source_stays_in_its_split(tmp_path: Path):
    """More books before the old ones, and more text of the old ones, move no source."""
    sources = [f"book {n // 2}" for n in range(80)]
    few = {"text": STORIES[:40], "source": sources[:40]}
    more = STORIES[40:] + STORIES[:40] + [story.replace("mouse", "squirrel") for story in STORIES]
    many = {"text": more, "source": sources[40:] + sources[:40] + sources}
    rows = prepared(tmp_path / "few", write_parquet(tmp_path / "few.parquet", few))
    rows += prepared(tmp_path / "many", write_parquet(tmp_path / "many.parquet", many))
    assert len(rows) == 40 + 160
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["source"], set()).add(row["split"])
    assert all(len(of_source) == 1 for of_source in splits.values())
    assert set.union(*splits.values()) == set(SPLITS)


def test_a_collection_with_weight_0_is_only_held_out(tmp_path: Path):
    path = write_parquet(tmp_path / "t.parquet", {"text": STORIES})
    collections = [{"name": "a", "source": str(path)}, {"name": "held", "source": str(path), "weight": 0}]
    config = make_config(tmp_path, collections, prepare={"validation_share": 0.2})
    manifest = prepare(config)
    assert {row["split"] for row in rows_of(config, "held")} == {"validation"}
    assert manifest["held"]["validation"]["documents"] == 80
    assert manifest["held"]["train"]["documents"] == 0


def test_the_seed_selects_the_held_out_sources():
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
        ("cafe\x00\u0301", "café"),
        ("one\r\x00\ntwo", "one\ntwo"),
        ("line \t\xa0\nnext", "line\nnext"),
        ("\n\n  text  \n\n", "text"),
        ("a\n \n \n \nb", "a\n\nb"),
        ("bell\x07\x1b[0m\x7f", "bell[0m"),
        ("", ""),
    ],
)
def test_text_is_cleaned(raw: str, cleaned: str):
    assert clean(raw) == cleaned


@given(st.text(alphabet=st.sampled_from("ab \t\n\r\x00\xa0\u0301é😀")))
def test_cleaning_is_idempotent_and_keeps_every_letter(text: str):
    def letters(text: str) -> list[str]:
        return [c for c in unicodedata.normalize("NFD", text) if c.isprintable() and not c.isspace()]

    once = clean(text)
    assert clean(once) == once
    assert letters(once) == letters(text)


def test_duplicates_and_short_documents_are_dropped(tmp_path: Path):
    more = [*(story + " \r\n" for story in STORIES), "too short", "", None, "x" * 63]
    path = write_parquet(tmp_path / "t.parquet", {"text": [*STORIES, *more]})
    rows = prepared(tmp_path / "w", path)
    assert texts(rows) == sorted(STORIES)
    assert len({row["source"] for row in rows}) == len(STORIES)  # without a source column


def test_minimum_and_max_documents_filter_rows(tmp_path: Path):
    columns = {"text": STORIES, "ease": [n / 80 for n in range(78)] + [None, math.nan]}
    path = write_parquet(tmp_path / "t.parquet", columns)
    assert texts(prepared(tmp_path / "w", path, minimum={"ease": 0.5})) == sorted(STORIES[40:78])
    assert texts(prepared(tmp_path / "w", path, max_documents=30)) == sorted(STORIES[:30])


@pytest.mark.parametrize("limit", [1, 3])
def test_same_opening_cuts_the_first_sentences_of_further_training_documents(tmp_path: Path, limit: int):
    """Case and punctuation do not count, held-out documents stay, and the thirteenth word may differ."""
    opening = "once upon a time there was a girl named lily she liked"
    alike = [f"{opening if n % 2 else opening.capitalize() + ':'} tea. {n} {story}" for n, story in enumerate(STORIES)]
    path = write_parquet(tmp_path / "t.parquet", {"text": alike + STORIES})
    without, rows = prepared(tmp_path / "w", path), prepared(tmp_path / "l", path, same_opening=limit)
    whole, kept = (
        {split: [row["text"] for row in result if row["split"] == split] for split in SPLITS}
        for result in (without, rows)
    )
    assert kept["validation"] == whole["validation"]
    expected, began_alike = [], 0
    for text in whole["train"]:
        began_alike += text in alike
        expected.append(text.split(" tea. ")[1] if text in alike and began_alike > limit else text)
    assert kept["train"] == expected


@pytest.mark.parametrize(("texts", "expected"), [
    (["A b. C d. E f."] * 4, ["A b. C d. E f.", "C d. E f.", "E f.", ""]),  # sentence by sentence, to the end
    (["A b", "a B!", "A b"], ["A b", "", ""]),  # no sentence ends there
    (["", "", "..."], ["", "", "..."]),  # nothing to compare
])  # fmt: skip
def test_opening_cutter_removes_sentences_until_the_opening_is_rare(texts: list[str], expected: list[str]):
    cut = opening_cutter(1)
    assert [cut(text) for text in texts] == expected
    assert [opening_cutter(None)(text) for text in texts] == texts


def broken_sources(directory: Path) -> dict[str, tuple[dict, str]]:
    """Write unusable sources; return for each file the collection's settings and a part of the expected error."""
    (directory / "empty.parquet").write_bytes(b"")
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
    return {
        "nothing.parquet": ({}, "no file matches"),
        "nothing-*.txt": ({}, "no file matches"),
        "empty.parquet": ({}, "empty.parquet is not a Parquet file"),
        "latin.txt": ({}, "latin.txt as UTF-8"),
        "empty.txt": ({}, "no documents for train"),
        "cut.txt.gz": ({}, "cut.txt.gz"),
        "cut.txt.xz": ({}, "cut.txt.xz"),
        "folder.txt": ({}, "folder.txt"),
        "folder.parquet": ({}, "folder.parquet is not a Parquet file"),
        "body.parquet": ({}, "no column 'text'"),
        "numbers.parquet": ({}, "not text"),
        "words.parquet": ({"minimum": {"ease": 0.5}}, "not a number"),
        "one.parquet": ({}, "no documents for"),
        "good.txt": ({"minimum": {"ease": 0.5}}, "no column 'ease'"),
    }


def test_an_unusable_source_leaves_the_earlier_text(tmp_path: Path):
    workdir, good = tmp_path / "w", write_parquet(tmp_path / "t.parquet", {"text": STORIES})
    prepared(workdir, good)
    earlier = tree_bytes(workdir / "text")
    for name, (settings, named) in broken_sources(tmp_path).items():
        broken = {"name": "b", "source": str(tmp_path / name), **settings}
        config = make_config(workdir, [{"name": "good", "source": str(good)}, broken])
        with pytest.raises(ConfigError) as raised:
            prepare(config)
        message = str(raised.value)
        assert message.startswith("collection 'b': "), name
        assert named in message, name
        assert "\n" not in message, name
        assert tree_bytes(workdir / "text") == earlier, name


def test_a_dataset_that_cannot_be_loaded_is_one_line(tmp_path: Path):
    command = ["-m", "train.prepare", "--config", "configs/train.yaml", f"workdir={tmp_path}"]
    result = python(command, tmp_path, timeout_s=120)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: collection 'tinystories': 'roneneldan/TinyStories'")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("through", ["text", "link", "linked file"])
def test_a_source_inside_the_output_is_refused_and_kept(tmp_path: Path, through: str):
    """`data/text` is a natural place for texts, and the default of workdir is `data`."""
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
    """Its manifest lists the files that may be replaced. Files beside the directory stay."""
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


def test_the_tokenizer_reads_collections_by_weight(tmp_path: Path):
    """A collection that is too small for its weight is repeated."""
    sources = {
        name: write_parquet(tmp_path / f"{name}.parquet", {"text": [f"{name}: {s}" for s in STORIES[:n]]})
        for name, n in {"large": 80, "small": 15}.items()
    }
    weights = {"large": 0.6, "small": 0.3}
    collections = [{"name": name, "source": str(sources[name]), "weight": weights[name]} for name in weights]
    config = make_config(tmp_path / "w", collections, prepare={"validation_share": 0.2})
    prepare(config)
    n_bytes = dict.fromkeys(weights, 0)
    for line in _training_lines(config, lambda: None):
        n_bytes[line.split(":")[0]] += len(line)
    assert n_bytes["large"] == pytest.approx(2 * n_bytes["small"], abs=200)  # whole documents are read
    manifest = json.loads((tmp_path / "w/text/manifest.json").read_text())
    assert sum(n_bytes.values()) == pytest.approx(sum(manifest[name]["train"]["bytes"] for name in weights), abs=200)

"""Clean the documents of all collections, and split them into train and validation by source.

    python -m train.prepare [--config configs/train.yaml] [KEY=VALUE ...]

Reads Parquet files with a text column, plain text files (.txt, also .gz, .bz2, .xz, .zst), and Hugging Face datasets.
Lines of <|endoftext|> separate the documents of a text file; without them, the file is one document. Writes
`<workdir>/text/<collection>.<split>.parquet` and `manifest.json` with sources, licences and counts.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinylm.system.files import is_inside, manifest_names, replaced_directory
from tinylm.terminal.output import say
from train.config import Collection, ConfigError, TrainConfig, run_stage
from train.data.progress import progress
from train.data.sources import Row, is_dataset_id, matching_files, read_rows
from train.release.choices import SENTENCE
from train.release.copying import words

SPLITS = ("train", "validation")
SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "collection", "source", "author", "licence")])
ROWS_PER_WRITE = 1000
MIN_CHARS = 64  # shorter documents are dropped
OPENING_WORDS = 12  # that `same_opening` compares

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")  # with the byte-order mark
_TRAILING_SPACE = re.compile(r"[ \t\xa0]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Return the text in NFC, with Unix line ends, without control characters and trailing spaces.

    At most one blank line remains in a row: 'Hi \\r\\n\\n\\n\\nthere\\x00' -> 'Hi\\n\\nthere'
    """
    text = _CONTROL.sub("", text)  # first, because NFC may join the characters around one
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _TRAILING_SPACE.sub("\n", text + "\n")
    return _BLANK_LINES.sub("\n\n", text).strip()


def is_validation(source: str, share: float, seed: int) -> bool:
    """Return whether a source is held out. A hash of its name decides, so more data never moves a source."""
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass
class Counts:
    """The counts and the checksum of one split of a collection."""

    documents: int = 0
    bytes: int = 0
    sources: set[str] = field(default_factory=set)
    licences: set[str] = field(default_factory=set)
    authors: set[str] = field(default_factory=set)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, row: dict[str, str]) -> None:
        """Count a document, a row of SCHEMA."""
        text = row["text"].encode()
        self.documents += 1
        self.bytes += len(text)
        self.digest.update(hashlib.sha256(text).digest())
        self.sources.add(row["source"])
        self.licences.add(row["licence"])
        self.authors.add(row["author"])

    def summary(self) -> dict[str, Any]:
        authors = sorted(self.authors - {""})
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "sources": len(self.sources),
            "licences": sorted(self.licences - {""}),
            "authors": len(authors),
            "author_names": authors,
            "sha256": self.digest.hexdigest(),  # of the documents' sums, in their order
        }


def prepare(config: TrainConfig) -> dict[str, Any]:
    """Run the stage; return the manifest that it wrote. The old text stays until the new text is complete."""
    _check_sources(config)
    manifest: dict[str, dict[str, Any]] = {}
    with replaced_directory(config.text_dir, text_files) as new:
        with progress("documents") as bar:
            for collection in config.prepare.collections:
                task = bar.add_task(collection.name, total=None)
                counts = _write_collection(collection, config, new, lambda task=task: bar.advance(task))  # type: ignore[misc]
                bar.update(task, total=sum(count.documents for count in counts.values()))
                manifest[collection.name] = {
                    "source": collection.source if is_dataset_id(collection.source) else Path(collection.source).name,
                    "attribution": collection.attribution,
                    **{split: counts[split].summary() for split in SPLITS},
                }
        (new / config.manifest_path.name).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name, entry in manifest.items():
        say(
            f"{name}: {entry['train']['documents']:,} documents to train on ({entry['train']['bytes'] / 1e6:.1f} MB), "
            f"{entry['validation']['documents']:,} held out ({entry['validation']['bytes'] / 1e6:.2f} MB)"
        )
    return manifest


def _check_sources(config: TrainConfig) -> None:
    """Raise ConfigError when a source lies in the directory that `prepare` replaces."""
    for collection in config.prepare.collections:
        for path in matching_files(collection.source):
            if is_inside(path, config.text_dir):
                raise ConfigError(
                    f"collection {collection.name!r}: {path} lies in {config.text_dir}, which this command replaces: "
                    "move it, or set another workdir"
                )


def text_files(directory: Path) -> set[str] | None:
    """Return the names of the files that `prepare` wrote; None when it did not write `directory`."""

    def names(manifest: dict[str, dict[str, Any]]) -> list[str]:
        return [f"{name}.{split}.parquet" for name in manifest for split in SPLITS if manifest[name][split]["sha256"]]

    return manifest_names(directory / "manifest.json", names)


def _write_collection(
    collection: Collection, config: TrainConfig, directory: Path, advance: Callable[[], None]
) -> dict[str, Counts]:
    """Write the documents of a collection, one file for each split; return the counts of each split.

    advance: called once for each document. Raises ConfigError when a split has no documents but needs some.
    """
    share = config.prepare.validation_share
    counts = {split: Counts() for split in SPLITS}
    pending: dict[str, list[Row]] = {split: [] for split in SPLITS}
    writers = {s: pq.ParquetWriter(directory / f"{collection.name}.{s}.parquet", SCHEMA) for s in SPLITS}
    cut = opening_cutter(collection.same_opening)
    for row in _documents(collection, config):
        is_held_out = not collection.weight or is_validation(row["source"], share, config.seed)
        if not is_held_out:
            row["text"] = cut(row["text"])
            if len(row["text"]) < MIN_CHARS:
                continue
        split = "validation" if is_held_out else "train"
        counts[split].add(row)
        pending[split].append(row)
        if len(pending[split]) == ROWS_PER_WRITE:
            writers[split].write_batch(pa.RecordBatch.from_pylist(pending[split], SCHEMA))
            pending[split] = []
        advance()
    for split, writer in writers.items():
        writer.write_batch(pa.RecordBatch.from_pylist(pending[split], SCHEMA))
        writer.close()
        if not counts[split].documents and (collection.weight or split == "validation"):
            n_usable = sum(count.documents for count in counts.values())
            raise ConfigError(
                f"collection {collection.name!r}: no documents for {split}, "
                f"of {n_usable} usable in {collection.source!r} (validation_share is {share})"
            )
    return counts


def opening_cutter(limit: int | None) -> Callable[[str], str]:
    """Return a function that removes first sentences of a text until at most `limit - 1` earlier texts begin like it.

    Texts begin alike if their first OPENING_WORDS words are the same, apart from case and punctuation. Without a limit,
    the function returns the text. A model copies the openings that it reads often.
    """
    seen: Counter[str] = Counter()

    def cut(text: str) -> str:
        if limit is None:
            return text
        while (opening := " ".join(words(text)[:OPENING_WORDS])) and seen[opening] >= limit:
            sentence = SENTENCE.match(text)
            text = text[sentence.end() :].lstrip() if sentence else ""
        seen[opening] += 1
        return text

    return cut


def _documents(collection: Collection, config: TrainConfig) -> Iterator[dict[str, str]]:
    """Yield the clean, distinct documents of at least MIN_CHARS, as rows of SCHEMA."""
    seen: set[bytes] = set()
    for row in read_rows(collection):
        text = _usable_text(row, collection)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < MIN_CHARS or digest in seen:
            continue
        seen.add(digest)
        source = row.get(collection.source_column)
        yield {
            "text": text,
            "collection": collection.name,
            "source": digest.hex()[:16] if source in (None, "") else str(source),
            "author": str(row.get("author") or ""),
            "licence": str(row.get("licence") or collection.licence),
        }
        if len(seen) == config.prepare.max_documents:
            return


def _usable_text(row: Row, collection: Collection) -> str:
    """Return the clean text of a row; '' when a column is below its minimum or missing.

    Raises ConfigError when the row lacks a column, or when a value has the wrong type.
    """
    try:
        if any(row[column] is None or not row[column] >= least for column, least in collection.minimum.items()):
            return ""
        return clean(row[collection.text_column] or "")
    except KeyError as error:
        raise ConfigError(f"collection {collection.name!r}: no column {error}, only {list(row)}") from None
    except (AttributeError, TypeError):
        wrong = {name: row[name] for name in (collection.text_column, *collection.minimum)}
        raise ConfigError(f"collection {collection.name!r}: not text, or not a number: {str(wrong)[:200]}") from None


if __name__ == "__main__":
    run_stage(__doc__, prepare)

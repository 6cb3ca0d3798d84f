"""Text from files or a Hugging Face dataset into cleaned documents, split into train and validation by source.

    python -m train.prepare [--config configs/train.yaml] [KEY=VALUE ...]

Reads Parquet (any columns, one of them text) and plain text (.txt, also .gz, .bz2, .xz, .zst; documents parted by
lines of <|endoftext|>, else a file is one document). Writes `<workdir>/text/<collection>.<split>.parquet` and
`manifest.json` with sources, licences, counts. Tokens are none of its business.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinylm.system.files import is_inside, manifest_names, replaced_directory
from tinylm.system.text_files import decode_text
from tinylm.terminal.output import say
from train.config import Collection, ConfigError, TrainConfig
from train.files import matching_files
from train.stage import progress, run_stage

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "collection", "source", "author", "licence")])
DOCUMENT_SEPARATOR = "<|endoftext|>"
ROWS_A_WRITE = 1000
MIN_CHARS = 64  # shorter documents are dropped

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")  # with the byte-order mark
_TRAILING_SPACE = re.compile(r"[ \t\xa0]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Unicode NFC, Unix line ends, no control characters, no space at line ends, at most one blank line in a row.

    'Hi \\r\\n\\n\\n\\nthere\\x00' -> 'Hi\\n\\nthere'
    """
    text = _CONTROL.sub("", text)  # first: the characters around one may belong together
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _TRAILING_SPACE.sub("\n", text + "\n")
    return _BLANK_LINES.sub("\n\n", text).strip()


def is_validation(source: str, share: float, seed: int) -> bool:
    """Whether a source is held out: a hash of its name decides, so more data never moves a source across."""
    digest = hashlib.sha256(f"{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass
class Counts:
    """What a split of a collection holds, added up document by document (rows of SCHEMA)."""

    documents: int = 0
    bytes: int = 0
    sources: set[str] = field(default_factory=set)
    licences: set[str] = field(default_factory=set)
    authors: set[str] = field(default_factory=set)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, row: dict[str, str]) -> None:
        self.documents += 1
        text = row["text"].encode()
        self.bytes += len(text)
        self.digest.update(hashlib.sha256(text).digest())
        self.sources.add(row["source"])
        self.licences.add(row["licence"])
        if row["author"]:
            self.authors.add(row["author"])

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "sources": len(self.sources),
            "licences": sorted(self.licences - {""}),
            "authors": len(self.authors),
            "author_names": sorted(self.authors),
            "sha256": self.digest.hexdigest(),  # of the documents' own sums, in their order
        }


def source_paths(collection: Collection) -> list[Path]:
    """Return the files of a collection, sorted; none when its source is the name of a dataset."""
    return matching_files(collection.source)


def check_sources(config: TrainConfig) -> None:
    """Raise ConfigError when a source lies in the directory that `prepare` replaces."""
    for collection in config.prepare.collections:
        for path in source_paths(collection):
            if is_inside(path, config.text_dir):
                raise ConfigError(
                    f"collection {collection.name!r}: {path} lies in {config.text_dir}, which this command replaces: "
                    "move it, or set another workdir"
                )


def text_files(directory: Path) -> set[str] | None:
    """Return the names of the files that `prepare` wrote; None when it did not write `directory`."""

    def names(manifest: dict[str, dict[str, Any]]) -> list[str]:
        return [f"{name}.{split}.parquet" for name in manifest for split in SPLITS if manifest[name][split]["sha256"]]

    return manifest_names(directory / MANIFEST, names)


def read_rows(collection: Collection) -> Iterator[dict[str, Any]]:
    """Rows of a collection as dictionaries with at least the text column; raises ConfigError when there is nothing."""
    if paths := source_paths(collection):
        for path in paths:
            yield from (_read_parquet if path.suffix == ".parquet" else _read_text)(path, collection)
    elif _is_dataset_id(collection.source):
        yield from _read_dataset(collection)
    else:
        raise ConfigError(f"collection {collection.name!r}: no file matches {collection.source!r}")


def _is_dataset_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and Path(source).suffix not in {
        ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst",
    }  # fmt: skip


def _read_parquet(path: Path, collection: Collection) -> Iterator[dict[str, Any]]:
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"collection {collection.name!r}: {path} is not a Parquet file: {error}") from None
    names = table.schema_arrow.names
    for column in [collection.text_column, *collection.minimum]:
        if column not in names:
            raise ConfigError(f"collection {collection.name!r}: {path} has no column {column!r}, only {names}")
    wanted = {collection.text_column, collection.source_column, "author", "licence", *collection.minimum}
    for batch in table.iter_batches(columns=[name for name in names if name in wanted]):
        yield from batch.to_pylist()


def _read_text(path: Path, collection: Collection) -> Iterator[dict[str, Any]]:
    try:
        # PyArrow knows every ending but .xz.
        with lzma.open(path) if path.suffix == ".xz" else pa.input_stream(str(path), compression="detect") as stream:
            text = decode_text(stream.read(), str(path))
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ConfigError(f"collection {collection.name!r}: cannot read {path} as UTF-8 text: {error}") from None
    documents = text.split(DOCUMENT_SEPARATOR)
    for number, document in enumerate(documents):
        source = path.name if len(documents) == 1 else f"{path.name}#{number}"
        yield {collection.text_column: document, collection.source_column: source}


def _read_dataset(collection: Collection) -> Iterator[dict[str, Any]]:
    import datasets  # heavy, and only this way in needs it

    try:
        yield from datasets.load_dataset(collection.source, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds: missing, private, offline, broken
        why, _, _ = str(error).partition("\n")
        raise ConfigError(
            f"collection {collection.name!r}: {collection.source!r} is no file here, and as a Hugging Face dataset "
            f"it could not be loaded: {type(error).__name__}: {why}"
        ) from None


def documents(collection: Collection, config: TrainConfig) -> Iterator[dict[str, str]]:
    """Cleaned, sufficiently long, distinct documents, as rows of SCHEMA."""
    seen: set[bytes] = set()
    for row in read_rows(collection):
        try:
            if any(row[column] is None or not row[column] >= least for column, least in collection.minimum.items()):
                continue
            text = clean(row[collection.text_column] or "")
        except KeyError as error:
            raise ConfigError(f"collection {collection.name!r}: no column {error}, only {list(row)}") from None
        except (AttributeError, TypeError):
            wrong = {name: row[name] for name in (collection.text_column, *collection.minimum)}
            raise ConfigError(f"collection {collection.name!r}: not text, or no number: {str(wrong)[:200]}") from None
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


def prepare(config: TrainConfig) -> dict[str, Any]:
    """Run the stage; return the manifest that it wrote. The old text stays until the new is whole."""
    check_sources(config)
    manifest: dict[str, dict[str, Any]] = {}
    with replaced_directory(config.text_dir, text_files) as new:
        with progress("documents") as bar:
            for collection in config.prepare.collections:
                task = bar.add_task(collection.name, total=None)
                counts = write_collection(collection, config, new, lambda task=task: bar.advance(task))  # type: ignore[misc]
                bar.update(task, total=sum(count.documents for count in counts.values()))
                manifest[collection.name] = {
                    "source": collection.source if _is_dataset_id(collection.source) else Path(collection.source).name,
                    "attribution": collection.attribution,
                    **{split: counts[split].summary() for split in SPLITS},
                }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name, entry in manifest.items():
        say(
            f"{name}: {entry['train']['documents']:,} documents to train on ({entry['train']['bytes'] / 1e6:.1f} MB), "
            f"{entry['validation']['documents']:,} held out ({entry['validation']['bytes'] / 1e6:.2f} MB)"
        )
    return manifest


def write_collection(
    collection: Collection, config: TrainConfig, directory: Path, advance: Callable[[], None]
) -> dict[str, Counts]:
    """Write the documents of a collection, one file for each split; return what each split holds.

    advance: called once for each document. Raises ConfigError when a split that must not be empty is.
    """
    share = config.prepare.validation_share
    counts = {split: Counts() for split in SPLITS}
    pending: dict[str, list[Any]] = {split: [] for split in SPLITS}
    writers = {s: pq.ParquetWriter(directory / f"{collection.name}.{s}.parquet", SCHEMA) for s in SPLITS}
    for row in documents(collection, config):
        held_out = not collection.weight or is_validation(row["source"], share, config.seed)
        split = SPLITS[held_out]
        counts[split].add(row)
        pending[split].append(row)
        if len(pending[split]) == ROWS_A_WRITE:
            writers[split].write_batch(pa.RecordBatch.from_pylist(pending[split], SCHEMA))
            pending[split] = []
        advance()
    for split, writer in writers.items():
        writer.write_batch(pa.RecordBatch.from_pylist(pending[split], SCHEMA))
        writer.close()
        if not counts[split].documents and (collection.weight or split == "validation"):
            raise ConfigError(
                f"collection {collection.name!r}: no documents for {split}, "
                f"of {sum(c.documents for c in counts.values())} usable in {collection.source!r} "
                f"(validation_share is {share})"
            )
    return counts


if __name__ == "__main__":
    run_stage(__doc__, prepare)

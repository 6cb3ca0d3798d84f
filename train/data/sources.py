"""The rows of a collection's source: Parquet files, plain text files, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tinylm.system.text_files import decode_text
from train.config import Collection, ConfigError

DOCUMENT_SEPARATOR = "<|endoftext|>"
_TEXT_ENDINGS = {".txt", ".gz", ".bz2", ".xz", ".zst"}

Row = dict[str, Any]


def matching_files(pattern: str) -> list[Path]:
    """Return the paths that a pattern matches, sorted. Brackets and stars in existing paths are part of their names."""
    path = Path(pattern)
    if path.exists():
        return [path]
    existing = next((parent for parent in path.parents if parent.exists()), Path())
    rest = str(path.relative_to(existing))
    return sorted(Path(found) for found in glob.glob(str(Path(glob.escape(str(existing)), rest)), recursive=True))  # noqa: PTH207


def is_dataset_id(source: str) -> bool:
    """Return whether a source without a file may be a dataset of Hugging Face."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and Path(source).suffix not in {
        ".parquet",
        *_TEXT_ENDINGS,
    }


def read_rows(collection: Collection) -> Iterator[Row]:
    """Yield the rows of a collection, each with the text column; raise ConfigError when the source is unusable."""
    if paths := matching_files(collection.source):
        for path in paths:
            yield from (_read_parquet if path.suffix == ".parquet" else _read_text)(path, collection)
    elif is_dataset_id(collection.source):
        yield from _read_dataset(collection)
    else:
        raise ConfigError(f"collection {collection.name!r}: no file matches {collection.source!r}")


def _read_parquet(path: Path, collection: Collection) -> Iterator[Row]:
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


def _read_text(path: Path, collection: Collection) -> Iterator[Row]:
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


def _read_dataset(collection: Collection) -> Iterator[Row]:
    import datasets  # slow to import

    try:
        yield from datasets.load_dataset(collection.source, split="train", streaming=True)
    except Exception as error:  # the library raises many types: missing, private, offline, broken
        reason, _, _ = str(error).partition("\n")
        raise ConfigError(
            f"collection {collection.name!r}: {collection.source!r} matches no file, and as a Hugging Face dataset "
            f"it could not be loaded: {type(error).__name__}: {reason}"
        ) from None

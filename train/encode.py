"""Encode the prepared text as shards of token ids, with Ray Data on one core or a cluster.

    python -m train.encode [--config configs/train.yaml] [KEY=VALUE ...]

Writes `<workdir>/tokens/<collection>.<split>-00000.npy` (uint16; each document is the boundary and then its text)
and `index.json`. Documents keep the order of the text, so two runs write the same bytes. Training shuffles them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tinylm.system.files import manifest_names, replaced_directory
from tinylm.terminal.output import say
from tinylm.tokenizer import Tokenizer
from train.config import TrainConfig, require, run_stage
from train.data.progress import progress
from train.data.tokens import INDEX_FILE, file_sha256, load_tokenizer

TOKEN_DTYPE = np.uint16
BATCH_DOCUMENTS = 256
# (config, Parquet file) -> batches in order: the concatenated `tokens` of documents, and the number of `documents`
Encoded = Callable[[TrainConfig, Path], Iterable[dict[str, Any]]]


def encode(config: TrainConfig) -> dict[str, Any]:
    """Run the stage; return the index that it wrote. The old tokens stay until the new tokens are complete."""
    require(config.manifest_path, "train.prepare")
    for collection in config.prepare.collections:  # one may be new in the config
        require(config.text_file(collection.name, "train"), "train.prepare")
    tokenizer = load_tokenizer(config)
    with replaced_directory(config.tokens_dir, token_files) as new:
        index = write_tokens(config, tokenizer, new, _encoded_by_ray)
    for name, entry in index["collections"].items():
        counts = ", ".join(f"{split} {written['tokens']:,}" for split, written in entry.items())
        say(f"{name}: {counts} tokens")
    return index


def token_files(directory: Path) -> set[str] | None:
    """Return the names of the files that `encode` wrote; None when it did not write `directory`."""

    def names(index: dict[str, Any]) -> list[str]:
        if not index["tokenizer_sha256"]:
            raise KeyError("tokenizer_sha256 is empty")
        return [name for entry in index["collections"].values() for split in entry.values() for name in split["shards"]]

    return manifest_names(directory / INDEX_FILE, names)


def write_tokens(config: TrainConfig, tokenizer: Tokenizer, directory: Path, encoded: Encoded) -> dict[str, Any]:
    """Write the shards of all collections and their index; return the index."""
    collections: dict[str, Any] = {}
    with progress("documents") as bar:
        for name in config.weights:
            collections[name] = {}
            for split in ("train", "validation"):
                path = config.text_file(name, split)
                n_documents = pq.ParquetFile(path).metadata.num_rows
                if not n_documents:
                    continue  # of a collection with weight 0
                task = bar.add_task(f"{name} {split}", total=n_documents)
                writer = _ShardWriter(directory, f"{name}.{split}", config.encode.shard_tokens, tokenizer.boundary_id)
                n_tokens = 0
                for batch in encoded(config, path):
                    tokens = np.asarray(batch["tokens"], TOKEN_DTYPE)
                    writer.add(tokens)
                    n_tokens += len(tokens)
                    bar.advance(task, int(batch["documents"]))
                writer.flush()
                collections[name][split] = {"shards": writer.shards, "tokens": n_tokens, "documents": n_documents}
    index = {
        "text_sha256": file_sha256(config.manifest_path),
        "tokenizer_sha256": file_sha256(config.tokenizer_path),
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "collections": collections,
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


class _ShardWriter:
    """Write tokens as files of at most `limit` tokens. A document is never split between two files."""

    def __init__(self, directory: Path, stem: str, limit: int, boundary_id: int) -> None:
        self._directory, self._stem, self._limit, self._boundary_id = directory, stem, limit, boundary_id
        self._pending: list[np.ndarray] = []
        self._size = 0
        self.shards: list[str] = []

    def add(self, tokens: np.ndarray) -> None:
        starts = np.flatnonzero(tokens == self._boundary_id)[1:]
        for document in np.split(tokens, starts):
            if self._size and self._size + len(document) > self._limit:
                self.flush()
            self._pending.append(document)
            self._size += len(document)

    def flush(self) -> None:
        if self._pending:
            name = f"{self._stem}-{len(self.shards):05d}.npy"
            np.save(self._directory / name, np.concatenate(self._pending))
            self.shards.append(name)
            self._pending, self._size = [], 0


def _encoded_by_ray(config: TrainConfig, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the encoded batches of documents of a Parquet file, in their order."""
    import ray.data  # slow to import

    if not ray.is_initialized():
        ray.init(os.environ.get("RAY_ADDRESS", "local"), log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False  # this module shows one
    yield from (
        ray.data.read_parquet(str(path.resolve()), columns=["text"])
        .map_batches(
            _Encoder,
            fn_constructor_args=[str(config.tokenizer_path.resolve())],
            batch_size=BATCH_DOCUMENTS,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, os.cpu_count() or 1)),
        )
        .iter_rows()
    )


class _Encoder:
    """Encode batches in a Ray Data worker, with one tokenizer per worker."""

    def __init__(self, tokenizer: str) -> None:
        self._tokenizer = Tokenizer(tokenizer)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        documents = [np.array(self._tokenizer.encode_document(text), TOKEN_DTYPE) for text in batch["text"]]
        # One row holds the whole batch. `_ShardWriter` splits it again at the boundaries.
        return {"tokens": [np.concatenate(documents)], "documents": [len(documents)]}


if __name__ == "__main__":
    run_stage(__doc__, encode)

"""The tokenizer and the tokens of the work directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tinylm.tokenizer import Tokenizer
from train.config import ConfigError, TrainConfig, require
from train.data.mixture import Mixture
from train.data.rows import Documents, Rows

INDEX_FILE = "index.json"  # beside the shards


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """Return the tokenizer of the work directory; raise ConfigError when it is missing or damaged."""
    require(config.tokenizer_path, "train.tokenizer")
    try:
        return Tokenizer(config.tokenizer_path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def load_tokens(config: TrainConfig) -> TokenData:
    """Return the tokens of the work directory.

    Raises ConfigError when they are missing, or were made from another tokenizer or other text than is there now.
    """
    require(config.tokens_dir / INDEX_FILE, "train.encode")
    final = config.run.final_max_tokens if config.run.final_share else {}
    data = TokenData.load(config.tokens_dir, config.shape.context, config.seed, config.weights, config.final_row, final)
    for what, expected, path in (
        ("with another tokenizer", data.tokenizer_sha256, config.tokenizer_path),
        ("from other text", data.text_sha256, config.manifest_path),
    ):
        if path.exists() and file_sha256(path) != expected:
            raise ConfigError(f"{config.tokens_dir} was made {what}: run `python -m train.encode` again")
    return data


@dataclass(frozen=True)
class TokenData:
    """The mixture to train on, and the held-out documents of each collection."""

    vocab_size: int
    boundary_id: int
    tokenizer_sha256: str
    text_sha256: str  # of the text's manifest, which holds the sums of all text
    context: int
    mixture: Mixture
    held_out: dict[str, Documents]

    @classmethod
    def load(
        cls,
        directory: Path,
        context: int,
        seed: int,
        weights: dict[str, float],
        final_row: int = 0,
        final_max_tokens: Mapping[str, int] = MappingProxyType({}),
    ) -> TokenData:
        """Read the directory of `train.encode`. weights: by collection, in any unit.

        From row `final_row` on, the collections of `final_max_tokens` give only documents of at most so many tokens.
        Raises ConfigError when a file is damaged, or when a collection with a weight has too few tokens.
        """
        try:
            index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
            documents = {split: _documents(directory, index, split) for split in ("train", "validation")}
        except (EOFError, KeyError, ValueError) as error:  # of JSON and NumPy, for incomplete files
            raise ConfigError(f"{directory} is damaged, make it again: {error}") from None
        names = ("vocab_size", "boundary_id", "tokenizer_sha256", "text_sha256")
        return cls(
            **{name: index[name] for name in names},
            context=context,
            mixture=Mixture(
                _training_rows(directory, documents["train"], context, seed, weights),
                weights,
                seed,
                _short_rows(documents["train"], context, seed, final_max_tokens),
                final_row,
            ),
            held_out=documents["validation"],
        )

    def validation_rows(self, collection: str, count: int) -> np.ndarray:
        """Return the first rows of the held-out documents, (<= count, context + 1) int64.

        Each document starts a row. Rows are padded with -1.
        """
        documents = self.held_out[collection]
        rows: list[np.ndarray] = []
        for i in range(len(documents)):
            tokens = documents.tokens(i).astype(np.int64)
            for start in range(0, len(tokens) - 1, self.context):
                part = tokens[start : start + self.context + 1]
                rows.append(np.pad(part, (0, self.context + 1 - len(part)), constant_values=-1))
                if len(rows) == count:
                    return np.stack(rows)
        return np.stack(rows)


def _documents(directory: Path, index: dict[str, Any], split: str) -> dict[str, Documents]:
    return {
        name: Documents([directory / shard for shard in entry[split]["shards"]], index["boundary_id"])
        for name, entry in index["collections"].items()
        if split in entry
    }


def _training_rows(
    directory: Path, documents: dict[str, Documents], context: int, seed: int, weights: dict[str, float]
) -> dict[str, Rows]:
    if missing := sorted(name for name, weight in weights.items() if weight and name not in documents):
        raise ConfigError(
            f"collection {missing[0]!r} is to be trained on, but {directory} has no tokens of it to train on: "
            f"run `python -m train.prepare` and the stages after it again"
        )
    rows = {name: Rows(of_collection, context, (seed, i)) for i, (name, of_collection) in enumerate(documents.items())}
    if short := [name for name, of_collection in rows.items() if of_collection.epoch_tokens <= context]:
        raise ConfigError(f"collection {short[0]!r} has fewer tokens than one row of {context + 1}: too little text")
    return rows


def _short_rows(
    documents: dict[str, Documents], context: int, seed: int, max_tokens: Mapping[str, int]
) -> dict[str, Rows]:
    """Return rows of the documents of at most `max_tokens` tokens, by collection."""
    rows = {}
    for i, name in enumerate(documents):
        if name in max_tokens:
            rows[name] = Rows(documents[name].of_at_most(max_tokens[name]), context, (seed, i, 1))
            if rows[name].epoch_tokens <= context:
                raise ConfigError(
                    f"run.final_max_tokens.{name} is {max_tokens[name]}: the documents of at most so many tokens "
                    f"do not fill one row of {context + 1}"
                )
    return rows
